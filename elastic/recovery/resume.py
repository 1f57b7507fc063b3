"""Finds the step at which a job can resume, from inventories alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from elastic.errors import CoverageLost, StateUnproven
from elastic.layout.regions import ModelSpec
from elastic.layout.runs import Run, missing
from elastic.recovery.inventory import Copy, Inventory


def resume_step(model: ModelSpec, inventories: Sequence[Inventory]) -> int:
    """Returns the newest step of which every coordinate of every layer has a full copy (live, previous or replica) with its scalars.

    Raises StateUnproven if two copies of one run and step have different digests. Raises CoverageLost, naming the missing runs, if no step
    from the highest `Inventory.floor` on is complete: that step was complete on all workers once, and nothing older is kept.
    """
    check_digests(inventories)
    floor = max((inventory.floor for inventory in inventories), default=-1)
    by_step: dict[int, list[Copy]] = defaultdict(list, {floor: []})
    for inventory in inventories:
        for copy in inventory.copies:
            if copy.full and copy.scalars:
                by_step[copy.step].append(copy)
    lost: dict[int, list[tuple[int, Run]]] = {}
    for step in sorted((step for step in by_step if step >= floor), reverse=True):
        lost[step] = _lost_runs(model, by_step[step])
        if not lost[step]:
            return step
    nearest = min(lost, key=lambda step: sum(stop - start for _, (start, stop) in lost[step]))
    runs = ", ".join(f"layer {layer} [{start}, {stop})" for layer, (start, stop) in lost[nearest])
    seen = f"; step {floor} was complete everywhere, so no earlier one is kept" if floor >= 0 else ""
    raise CoverageLost(
        f"no surviving worker has a full copy of {runs} of step {nearest}; the last step known is {max(by_step)}{seen}: "
        "more workers were lost at once than there are copies"
    )


def check_digests(inventories: Iterable[Inventory]) -> None:
    """Raises StateUnproven if two copies of one run and step have different digests (where both are given)."""
    known: dict[tuple[int, int, int, int, bool], tuple[str, int, str]] = {}
    for inventory in inventories:
        for copy in inventory.copies:
            if copy.digest is None:
                continue
            key = (copy.layer, copy.start, copy.stop, copy.step, copy.full)
            digest, worker, role = known.setdefault(key, (copy.digest, inventory.worker, copy.role))
            if digest != copy.digest:
                raise StateUnproven(
                    f"layer {copy.layer}, run [{copy.start}, {copy.stop}) of step {copy.step} has digest {digest} on worker {worker} "
                    f"({role}) and {copy.digest} on worker {inventory.worker} ({copy.role}): one of the copies is corrupt, "
                    "and the runtime cannot find out which. Start again from an earlier checkpoint, and test the memory of both hosts"
                )


def _lost_runs(model: ModelSpec, copies: Iterable[Copy]) -> list[tuple[int, Run]]:
    had: dict[int, list[Run]] = defaultdict(list)
    for copy in copies:
        had[copy.layer].append((copy.start, copy.stop))
    return [(spec.index, run) for spec in model.layers if spec.size for run in missing([(0, spec.size)], sorted(had[spec.index]))]
