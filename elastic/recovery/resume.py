"""Finds the step at which a job can resume, from inventories alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from elastic.errors import CoverageLost, StateUnproven
from elastic.layout.regions import ModelSpec
from elastic.layout.runs import Run, missing
from elastic.recovery.inventory import Copy, Inventory


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """Two copies of one run and step whose digests differ: pairs of a worker with its role, and the digest."""

    layer: int
    start: int
    stop: int
    step: int
    copies: tuple[tuple[int, str, str], tuple[int, str, str]]

    def described(self, model: ModelSpec) -> str:
        """Says in words which copies differ."""
        (one, role, digest), (other, other_role, other_digest) = self.copies
        run = f"{model.layers[self.layer].title}, run [{self.start}, {self.stop})"
        return f"{run} of step {self.step} has digest {digest} on worker {one} ({role}) and {other_digest} on worker {other} ({other_role})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """`back`: copies of later steps are not trusted (None: all are). `conflicts` are the copies in the inventories that differ."""

    back: int | None = None
    conflicts: tuple[Disagreement, ...] = ()

    @classmethod
    def of(cls, inventories: Sequence[Inventory]) -> Trust:
        """Returns which copies may be resumed from: none of a step at which two differ, nor of one that a worker has found to differ."""
        found = tuple(conflicts(inventories))
        newest = [*(conflict.step - 1 for conflict in found), *(each.back for each in inventories if each.back is not None)]
        return cls(back=min(newest, default=None), conflicts=found)


def resume_step(model: ModelSpec, inventories: Sequence[Inventory], trust: Trust | None = None) -> int:
    """Returns the newest trusted step of which every coordinate of every layer has a full copy with its scalars; see `Copy.full`.

    Raises StateUnproven if copies differ and no older step is complete. Raises CoverageLost, naming the missing runs, if no step from the
    highest `Inventory.floor` on is complete: that step was complete on all workers once, and nothing older is kept otherwise.
    """
    trust = Trust.of(inventories) if trust is None else trust
    floor = max((inventory.floor for inventory in inventories), default=-1) if trust.back is None else -1
    by_step: dict[int, list[Copy]] = defaultdict(list, {} if trust.back is not None else {floor: []})
    for inventory in inventories:
        for copy in inventory.copies:
            full = copy.full or copy.layer in model.frozen  # what is not trained has no states, so every member of the stage has all of it
            if full and copy.scalars and (trust.back is None or copy.step <= trust.back):
                by_step[copy.step].append(copy)
    lost: dict[int, list[tuple[int, Run]]] = {}
    for step in sorted((step for step in by_step if step >= floor), reverse=True):
        lost[step] = _lost_runs(model, by_step[step])
        if not lost[step]:
            return step
    if trust.back is not None:
        found = [conflict.described(model) for conflict in trust.conflicts[:1]]
        why = f"{found[0]}: one of the copies is corrupt, and" if found else "copies of the state differ, and"
        raise StateUnproven(
            f"{why} nothing shows which. No state of step {trust.back} or before, which was the same in all copies, is complete in memory. "
            "Start again from a checkpoint of such a step, and test the memory of the hosts",
            back=trust.back,
        )
    nearest = min(lost, key=lambda step: sum(stop - start for _, (start, stop) in lost[step]))
    runs = ", ".join(f"{model.layers[layer].title} [{start}, {stop})" for layer, (start, stop) in lost[nearest])
    seen = f"; step {floor} was complete everywhere, so no earlier one is kept" if floor >= 0 else ""
    known = max(by_step)
    begun = "more workers were lost at once than there are copies"
    unbegun = "workers were lost before each had its part of the initial state where it outlives them"
    raise CoverageLost(
        f"no surviving worker has a full copy of {runs} of step {nearest}; the last step known is {known}{seen}: "
        f"{unbegun if known < 0 else begun}",
        known=known,
    )


def conflicts(inventories: Iterable[Inventory]) -> Iterator[Disagreement]:
    """Yields the copies of one run and step that have different digests (where both are given)."""
    known: dict[tuple[int, int, int, int, bool], tuple[int, str, str]] = {}
    for inventory in inventories:
        for copy in inventory.copies:
            if copy.digest is None:
                continue
            key = (copy.layer, copy.start, copy.stop, copy.step, copy.full)
            mine = inventory.worker, copy.role, copy.digest
            first = known.setdefault(key, mine)
            if first[-1] != copy.digest:
                yield Disagreement(layer=copy.layer, start=copy.start, stop=copy.stop, step=copy.step, copies=(first, mine))


def _lost_runs(model: ModelSpec, copies: Iterable[Copy]) -> list[tuple[int, Run]]:
    had: dict[int, list[Run]] = defaultdict(list)
    for copy in copies:
        had[copy.layer].append((copy.start, copy.stop))
    return [(spec.index, run) for spec in model.layers if spec.size for run in missing([(0, spec.size)], sorted(had[spec.index]))]
