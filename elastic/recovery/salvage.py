"""Which grains of the interrupted step need not be computed again: those that every stage of the next view has finished. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from elastic.recovery.inventory import Inventory
from elastic.view import View


def usable(view: View, inventory: Inventory, step: int) -> frozenset[int]:
    """The grains of step `step` that the inventory's worker has finished, and that are of use in `view`.

    They are if it is a member there, holds no other layers than it has sums of, and is to compute all that these sums cover.
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
    """The grains of step `step` of which every stage of `view` has the sums where they are to be computed, ascending."""
    found = {worker: usable(view, inventory, step) for worker, inventory in inventories.items()}
    return tuple(grain for grain in range(view.workload.grains) if all(grain in found.get(route[grain], ()) for route in view.plan.routes))
