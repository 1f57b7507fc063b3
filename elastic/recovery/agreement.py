"""What inventories say together: optimizer states, scalars, settings, results, changes of loop bodies, registered objects. Pure.

The workers are replicas of one training, so values that several of them have must be equal.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from elastic.errors import CopiesConflict
from elastic.layout.regions import SAME
from elastic.recovery.inventory import Inventory, Progress, Scalars


def states_of(inventories: Iterable[Inventory]) -> dict[str, str]:
    """Returns the dtype of each optimizer state. Raises CopiesConflict if workers name different ones."""
    merged: dict[str, tuple[str, int]] = {}
    for inventory in inventories:
        for state, dtype in inventory.states.items():
            known, worker = merged.setdefault(state, (dtype, inventory.worker))
            if known == SAME:
                merged[state] = dtype, inventory.worker
            elif dtype not in (SAME, known):
                raise CopiesConflict(
                    f"optimizer state {state!r} has dtype {known} on worker {worker} and {dtype} on worker {inventory.worker}: "
                    "the workers run different optimizers"
                )
    return {state: dtype for state, (dtype, _) in merged.items()}


def scalars_at(inventories: Iterable[Inventory], step: int) -> Scalars:
    """Returns the scalars of all parameters at a step. Raises CopiesConflict if workers have different ones."""
    merged: Scalars = {}
    sources: dict[tuple[str, str], int] = {}
    for inventory in inventories:
        for name, values in inventory.scalars.get(step, {}).items():
            ours = merged.setdefault(name, {})
            for state, value in values.items():
                source = sources.setdefault((name, state), inventory.worker)
                if ours.setdefault(state, value) != value:
                    raise CopiesConflict(
                        f"{state!r} of parameter {name!r} at step {step} is {ours[state]} on worker {source} and {value} on worker "
                        f"{inventory.worker}: their optimizers have taken different steps"
                    )
    return merged


def progress_at(inventories: Iterable[Inventory], step: int) -> Progress | None:
    """Returns the step's progress, from before its loop body if a survivor has that, since the body may still have to run."""
    found: tuple[Progress, int] | None = None
    for inventory in inventories:
        progress = inventory.progress.get(step) if step >= 0 else None
        if progress is None:
            continue
        if found is None:
            found = progress, inventory.worker
        elif not _same(found[0].apply, progress.apply):
            raise CopiesConflict(
                f"the decision of step {step} was {found[0].apply} on worker {found[1]} and {progress.apply} on worker {inventory.worker}"
            )
        elif found[0].body and not progress.body:
            found = progress, inventory.worker
    return None if found is None else found[0]


def _same(one: Any, other: Any) -> bool:
    """Returns whether two JSON values are equal, NaN included: the loss of a skipped step may be NaN."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def changes_for(survivors: Sequence[Inventory], joiners: Collection[int]) -> list[Any]:
    """Returns the changes by loop bodies that joiners need, since these bodies did not run there; survivors have their own."""
    return [inventory.changes for inventory in survivors if inventory.changes] if joiners else []


def objects_for(survivors: Sequence[Inventory], joiners: Collection[int]) -> list[Any]:
    """Returns the states of registered objects by step, as survivors have them; nothing if every member has its own."""
    found = {inventory.objects[0]: inventory.objects[1] for inventory in survivors if inventory.objects is not None}
    needed = joiners or any(inventory.objects is None for inventory in survivors)
    return [[step, found[step]] for step in sorted(found)] if needed else []


def results_of(inventories: Iterable[Inventory]) -> list[Any]:
    """Returns the results of the collectives that any worker finished, as `[name, result]` by name."""
    return [[number, result] for number, result in sorted({n: r for inventory in inventories for n, r in inventory.results}.items())]


def with_progress(inventory: Inventory, steps: Collection[int]) -> Inventory:
    """Returns an inventory without copies of steps that nobody can go on from, since their settings are unknown."""
    return replace(inventory, copies=tuple(copy for copy in inventory.copies if copy.step in steps or copy.step < 0))
