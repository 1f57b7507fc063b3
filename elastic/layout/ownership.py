"""Assigns owners to runs: a new cut, or one as near to an earlier ownership as balance allows.

This module works on plain numbers and imports no layout. Use `elastic.layout.layout.spread` to make a layout.
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
"""The owner of a run that has none yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnedRun:
    """The run `[start, stop)` (elements) of a layer, its owner or `FREE`, and in `had` its earlier owner, then its replicas' holders."""

    start: int
    stop: int
    owner: int
    had: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Length of the run."""
        return self.stop - self.start


def cut(model: ModelSpec, layer: int, totals: dict[int, int]) -> Iterator[tuple[int, int, int]]:
    """Yields `(start, stop, owner)` of one layer, in the order of the members; adds each member's elements to `totals`."""
    size = model.layers[layer].size
    points = model.cut_points(layer)
    everything = sum(totals.values()) + size
    start = before = 0
    for place, owner in enumerate(totals, 1):
        # The ideal end compensates for rounding in the layers before, of this member and of those before it.
        before += totals[owner]
        ideal = everything * place / len(totals) - before
        stop = max(start, _nearest(points, size, ideal)) if place < len(totals) else size
        if start < stop:
            yield start, stop, owner
        totals[owner] += stop - start
        start = stop


def keep(
    model: ModelSpec, layers: Sequence[int], members: Sequence[int], before: Mapping[int, Sequence[OwnedRun]]
) -> dict[int, list[OwnedRun]]:
    """Returns each layer's pieces with their owners: the earlier owner where it is in `members`, as far as shares stay equal.

    Runs whose owner has left go to members below their fair share of the stage. Members above it, as after a join, give up ends of their
    runs. If a layer would have more than two runs per member, its smallest runs are first merged into their neighbours; if that does not
    help, the layer is cut again.
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
    """The owners within one stage while `keep` assigns them.

    `short` is how many elements each member lacks in the layers considered so far (negative: it has too many). `carry` is the rounding
    error that one member passes to the next; without it, many halves of a block would add up.
    """

    def __init__(
        self,
        model: ModelSpec,
        layers: Sequence[int],
        members: Sequence[int],
        before: Mapping[int, Sequence[OwnedRun]],
        crowded: Mapping[int, int],
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
        """Leaves at most one run per member, by merging the smallest runs into a neighbour."""
        while len(runs := self.runs(layer)) > len(self.members):
            place = min(range(len(runs)), key=lambda i: runs[i][2] - runs[i][1])
            neighbours = [runs[i] for i in (place - 1, place + 1) if 0 <= i < len(runs)]
            owner = min(neighbours, key=lambda run: (run[0] == FREE, run[2] - run[1]))[0]
            self._give(layer, *runs[place][1:], owner)

    def take(self) -> None:
        """Frees the surplus of members: whole runs first, from layers where the member owns much and others have freed little."""
        runs: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        excess: Counter[tuple[int, int]] = Counter()  # by member and layer: elements owned, less those freed there
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
        """Gives all free runs to members that have too little."""
        self.carry = 0.0
        # Layers in few runs come last and get the small pieces that are left over.
        for layer in sorted(self.pieces.keys() - set(self.open), key=lambda layer: (-len(self.runs(layer)), layer)):
            for owner, start, stop in self.runs(layer):
                if owner == FREE:
                    self._deal_run(layer, start, stop)
        for layer in self.open:
            self._deal_layer(layer)

    def _deal_layer(self, layer: int) -> None:
        """Divides a layer that has no owner left into equal shares, in the order of its earlier owners."""
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
        """Gives the run to a neighbour, which adds no run, or to the member that lacks most. No member gets too much of one layer."""
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
            if satisfied or self.short[owner] < BLOCK / 2:  # otherwise it can still get more
                self.carry = max(-BLOCK, min(self.carry + self.short[owner], BLOCK))
            owned[owner] += end - start
            start = end

    def _end(self, layer: int, start: int, stop: int, elements: float) -> int:
        """Returns the allowed end in `(start, stop]` that is nearest to `start + elements`."""
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
            changed += (OwnedRun(start=a, stop=b, owner=holder, had=piece.had) for a, b, holder in parts if a < b)
        self.pieces[layer] = changed


def _nearest(points: Sequence[int], size: int, position: float) -> int:
    """Returns the one of `points` (ascending) and `size` that is nearest to `position`; the lower one if two are equally near."""
    above = bisect_left(points, position)
    return min([*points[max(above - 1, 0) : above + 1], size], key=lambda point: abs(point - position))
