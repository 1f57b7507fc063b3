"""Who owns which run: cut afresh, or as near to an earlier ownership as balance allows.

Only numbers go in and out, so that it knows nothing of layouts; `elastic.layout.layout.spread` is what others use.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from elastic.layout.regions import BLOCK, ModelSpec
from elastic.layout.runs import shared

FREE = -1
"""The owner of what has none yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnedRun:
    """The run `[start, stop)` (elements) of a layer, its owner or `FREE`, and its earlier owner and replica."""

    start: int
    stop: int
    owner: int
    had: tuple[int, int | None]

    @property
    def elements(self) -> int:
        """Length of the run."""
        return self.stop - self.start


def cut(model: ModelSpec, layer: int, totals: dict[int, int]) -> Iterator[tuple[int, int, int]]:
    """`(start, stop, owner)` of one layer, in the order of the members; adds what each member got to `totals` (elements)."""
    size = model.layers[layer].size
    points = model.cut_points(layer)
    everything = sum(totals.values()) + size
    start = before = 0
    for place, owner in enumerate(totals, 1):
        # The ideal end makes up for what rounding gave to this member and those before it in the layers done so far.
        before += totals[owner]
        ideal = everything * place / len(totals) - before
        stop = max(start, _nearest(points, size, ideal)) if place < len(totals) else size
        if start < stop:
            yield start, stop, owner
        totals[owner] += stop - start
        start = stop


def keep(model: ModelSpec, layers: range, members: Sequence[int], before: Mapping[int, Sequence[OwnedRun]]) -> dict[int, list[OwnedRun]]:
    """Every layer's pieces with their owners: the earlier ones where they are among `members`, as far as shares stay equal.

    Runs whose owner has left go to members below their fair share of the stage; members above it, as when somebody joined, give ends of
    their runs. A layer that would be in more than two runs per member loses its smallest ones to their neighbours first, or, where that
    does not help, is cut afresh.
    """
    crowded: Counter[int] = Counter()
    while True:
        stage = _StageOwners(model, layers, members, before, crowded)
        stage.take()
        stage.deal()
        found = [layer for layer in layers if len(stage.runs(layer)) > 2 * len(members)]
        if not found:
            return stage.pieces
        crowded.update(found)


class _StageOwners:
    """`short` is what each member has too little of the layers considered so far (elements; below 0: too much).

    `carry` is what rounding to cut points has left over from one member to the next: many halves of a block would add up.
    """

    def __init__(
        self, model: ModelSpec, layers: range, members: Sequence[int], before: Mapping[int, Sequence[OwnedRun]], crowded: Mapping[int, int]
    ) -> None:
        self.members = members
        self.size = {layer: model.layers[layer].size for layer in layers}
        self.points = {layer: model.cut_points(layer) for layer in layers}
        self.short = dict.fromkeys(members, 0.0)
        self.carry = 0.0
        self.open: list[int] = []
        self.pieces: dict[int, list[OwnedRun]] = {}
        for layer in layers:
            staying = () if crowded[layer] > 1 else members
            self.pieces[layer] = [piece if piece.owner in staying else replace(piece, owner=FREE) for piece in before[layer]]
            if all(piece.owner == FREE for piece in self.pieces[layer]):
                self.open.append(layer)
                continue
            if crowded[layer]:
                self._simplify(layer)
            self._consider(layer)
            for piece in self.pieces[layer]:
                if piece.owner != FREE:
                    self.short[piece.owner] -= piece.elements

    def _consider(self, layer: int) -> None:
        for member in self.members:
            self.short[member] += self.size[layer] / len(self.members)

    def _simplify(self, layer: int) -> None:
        """Leaves at most one run per member, by giving the smallest ones to a neighbour."""
        while len(runs := self.runs(layer)) > len(self.members):
            place = min(range(len(runs)), key=lambda i: runs[i][2] - runs[i][1])
            beside = [runs[i] for i in (place - 1, place + 1) if 0 <= i < len(runs)]
            owner = min(beside, key=lambda run: (run[0] == FREE, run[2] - run[1]))[0]
            self._give(layer, *runs[place][1:], owner)

    def take(self) -> None:
        """Frees what members have too much: whole runs first, from layers of which they own much and others have freed little."""
        runs: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        excess: Counter[tuple[int, int]] = Counter()  # of a member in a layer: what it owns, less what has been freed there
        for layer in self.pieces:
            for owner, start, stop in self.runs(layer):
                runs[owner].append((layer, start, stop))
                excess[owner, layer] += stop - start
        freed = dict.fromkeys(self.pieces, 0)
        for member in sorted((member for member in self.members if self.short[member] < 0), key=self.short.__getitem__):
            surplus = self.carry - self.short[member]
            share = {layer: (freed[layer] - excess[member, layer]) / max(self.size[layer], 1) for layer in self.pieces}
            for layer, start, stop in sorted(runs[member], key=lambda run: share[run[0]]):
                if surplus <= 0:
                    break
                if surplus < stop - start:
                    if start and self._owner(layer, start - 1) == FREE:
                        stop = max(start, min(stop, _nearest(self.points[layer], self.size[layer], start + surplus)))
                    else:
                        start = min(stop, max(start, _nearest(self.points[layer], self.size[layer], stop - surplus)))
                freed[layer] += stop - start
                surplus -= stop - start
                self._give(layer, start, stop, FREE)
                self.short[member] += stop - start
            self.carry = max(-BLOCK, min(surplus, BLOCK))

    def deal(self) -> None:
        """Gives all that is free to members that have too little."""
        self.carry = 0.0
        # Small pieces are left over for the layers that come last: those that are in few runs.
        for layer in sorted(self.pieces.keys() - set(self.open), key=lambda layer: (-len(self.runs(layer)), layer)):
            for owner, start, stop in self.runs(layer):
                if owner == FREE:
                    self._deal_run(layer, start, stop)
        for layer in self.open:
            self._deal_layer(layer)

    def _deal_layer(self, layer: int) -> None:
        """A layer of which nobody keeps anything: in equal shares, in the order in which they had it, if they did."""
        self._consider(layer)
        middle: dict[int, int] = {}
        for piece in self.pieces[layer]:
            middle.setdefault(piece.had[0], piece.start + piece.stop)
        order = sorted(self.members, key=lambda member: middle.get(member, 2 * self.size[layer]))
        wanted = {member: max(self.short[member], 0.0) for member in order}
        everything = sum(wanted.values()) or 1.0
        start, ideal = 0, 0.0
        for member in order:
            ideal += wanted[member] * self.size[layer] / everything
            stop = self.size[layer] if member == order[-1] else max(start, _nearest(self.points[layer], self.size[layer], ideal))
            self._give(layer, start, stop, member)
            self.short[member] -= stop - start
            start = stop

    def _deal_run(self, layer: int, start: int, stop: int) -> None:
        """To a neighbour, which makes no new run; else whole to whoever lacks most, but not too much of one layer to one member."""
        most = 2 * self.size[layer] / len(self.members) + BLOCK
        owned = dict.fromkeys(self.members, 0)
        for piece in self.pieces[layer]:
            if piece.owner != FREE:
                owned[piece.owner] += piece.elements
        right = self._owner(layer, stop)
        while start < stop:
            room, left = stop - start, self._owner(layer, start - 1)
            wanted = {member: min(self.short[member], most - owned[member]) for member in self.members}
            least = min(room, BLOCK)
            if max(wanted.values()) < least:
                wanted, least = self.short, least / 2
            if wanted.get(right, 0) >= max(room - BLOCK / 2, least):
                owner, end = right, stop
            else:
                owner = left if wanted.get(left, 0) >= least else max(self.members, key=wanted.__getitem__)
                end = self._end(layer, start, stop, wanted[owner] + self.carry)
            self._give(layer, start, end, owner)
            satisfied = end < stop and wanted[owner] == self.short[owner]
            self.short[owner] -= end - start
            if satisfied or self.short[owner] < BLOCK / 2:  # else it can still get something
                self.carry = max(-BLOCK, min(self.carry + self.short[owner], BLOCK))
            owned[owner] += end - start
            start = end

    def _end(self, layer: int, start: int, stop: int, elements: float) -> int:
        """The allowed end in `(start, stop]` that is nearest to `elements` behind `start`."""
        points, ideal = self.points[layer], max(start + elements, start + 1)
        above = bisect_left(points, ideal)
        options = [point for point in points[max(above - 1, 0) : above + 1] if start < point < stop]
        return min([*options, stop], key=lambda point: abs(point - ideal))

    def runs(self, layer: int) -> list[tuple[int, int, int]]:
        grouped = [(owner, list(pieces)) for owner, pieces in groupby(self.pieces[layer], lambda piece: piece.owner)]
        return [(owner, pieces[0].start, pieces[-1].stop) for owner, pieces in grouped]

    def _owner(self, layer: int, position: int) -> int:
        return next((piece.owner for piece in self.pieces[layer] if piece.start <= position < piece.stop), FREE)

    def _give(self, layer: int, start: int, stop: int, owner: int) -> None:
        changed: list[OwnedRun] = []
        for piece in self.pieces[layer]:
            both = shared((piece.start, piece.stop), (start, stop))
            if both is None:
                changed.append(piece)
                continue
            first, last = both
            parts = ((piece.start, first, piece.owner), (first, last, owner), (last, piece.stop, piece.owner))
            changed += (OwnedRun(start=a, stop=b, owner=who, had=piece.had) for a, b, who in parts if a < b)
        self.pieces[layer] = changed


def _nearest(points: Sequence[int], size: int, position: float) -> int:
    """The one of `points` (ascending) and `size` that is nearest to `position`, the lower one of two."""
    above = bisect_left(points, position)
    return min([*points[max(above - 1, 0) : above + 1], size], key=lambda point: abs(point - position))
