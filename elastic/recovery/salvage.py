"""Finds the grains of an interrupted step that need not be computed again: those that every stage of the next view has finished. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from elastic.recovery.inventory import Inventory
from elastic.view import View


def usable(view: View, inventory: Inventory, step: int) -> frozenset[int]:
    """Returns the grains of step `step` that the inventory's worker has finished and can use in `view`.

    They are usable if the worker is a member of `view`, has sums of all layers it holds there, and is routed all grains that these sums
    cover.
    """
    worker, finished = inventory.worker, inventory.finished
    if finished is None or finished.step != step or worker not in view.workers:
        return frozenset()
    stage = view.plan.stage_of(worker)
    layers, route = view.plan.stages[stage].layers, view.plan.routes[stage]
    routed = frozenset(grain for grain, to in enumerate(route) if to == worker)
    if layers.start < finished.layers.start or layers.stop > finished.layers.stop or not routed.issuperset(finished.summed):
        return frozenset()
    return routed.intersection(finished.grains)


def finished_everywhere(view: View, inventories: Mapping[int, Inventory], step: int) -> tuple[int, ...]:
    """Returns, ascending, the grains of step `step` that in every stage of `view` are finished on the worker they are routed to."""
    found = {worker: usable(view, inventory, step) for worker, inventory in inventories.items()}
    return tuple(grain for grain in range(view.workload.grains) if all(grain in found.get(route[grain], ()) for route in view.plan.routes))
