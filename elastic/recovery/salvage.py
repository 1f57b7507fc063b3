"""What of an interrupted step need not be computed again, and how the next view takes the rest of it. Pure.

A grain is finished at a stage if a worker has the sums of its gradients: a member of the stage, or a worker that has died and left them in
its segment; then a member of the stage on the same host, its *heir*, takes them over. Grains that every stage has finished are not computed
again. In the interrupted step the others are routed anew: to whoever has sums that cover them, else evenly. Later steps follow the plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from elastic.recovery.inventory import FinishedGrains, Inventory
from elastic.view import View

Routes = tuple[tuple[int, ...], ...]
"""For each stage, the worker of each grain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """How a view takes the interrupted step: its routes, the grains that all stages finished, and pairs of a dead worker and its heir."""

    routes: Routes
    finished: tuple[int, ...] = ()
    heirs: tuple[tuple[int, int], ...] = ()


def usable(view: View, routes: Routes, inventory: Inventory, step: int) -> bool:
    """Returns whether a member of `view` can use the sums of step `step` in its own inventory, when that step takes these routes.

    They must cover all layers that it holds, and it must be routed all grains that they cover.
    """
    worker, finished = inventory.worker, inventory.finished
    if worker not in view.workers or finished is None:
        return False
    stage = view.plan.stage_of(worker)
    return covers(finished, view.plan.stages[stage].layers, step) and all(routes[stage][grain] == worker for grain in finished.summed)


def covers(finished: FinishedGrains | None, layers: range, step: int) -> bool:
    """Returns whether there are sums of all these layers, of step `step`."""
    if finished is None or finished.step != step or not finished.grains:
        return False
    return finished.layers.start <= layers.start and layers.stop <= finished.layers.stop


def restart(
    view: View, step: int, inventories: Mapping[int, Inventory], offers: Sequence[Inventory] = (), hosts: Mapping[int, str] | None = None
) -> Restart:
    """Returns how `view` takes step `step`. `hosts` are those of the dead workers whose `offers` may be used."""
    here = {member.worker: member.host for member in view.members}
    dead = [offer for offer in offers if offer.worker in (hosts or {})]
    heirs: list[tuple[int, int]] = []
    claims: list[dict[int, int]] = []
    finished = set(range(view.workload.grains))
    for stage in view.plan.stages:
        claimed: dict[int, int] = {}
        done: set[int] = set()
        own = [(worker, inventories[worker]) for worker in stage.members if worker in inventories]
        for inventory in [*(inventory for _, inventory in own), *dead]:
            found, heir = inventory.finished, inventory.worker
            if not covers(found, stage.layers, step) or found is None or claimed.keys() & set(found.summed):
                continue
            if heir not in stage.members:
                near = [worker for worker in stage.members if here[worker] == (hosts or {})[heir]]
                if not near:
                    continue
                heir = min(near, key=lambda worker: sum(1 for other in claimed.values() if other == worker))
                heirs.append((inventory.worker, heir))
            claimed |= dict.fromkeys(found.summed, heir)
            done |= set(found.grains)
        claims.append(claimed)
        finished &= done
    if not finished:
        return Restart(routes=view.plan.routes)
    routes = tuple(_routes(view, number, claimed, finished) for number, claimed in enumerate(claims))
    return Restart(routes=routes, finished=tuple(sorted(finished)), heirs=tuple(heirs))


def _routes(view: View, number: int, claimed: Mapping[int, int], finished: set[int]) -> tuple[int, ...]:
    """Returns the routes of one stage: what is left goes to the worker that would finish it first, the plan's own among equals."""
    members, planned, slowdowns = view.plan.stages[number].members, view.plan.routes[number], view.slowdowns
    load = {member: sum(1 for grain, worker in claimed.items() if worker == member and grain not in finished) for member in members}
    route: list[int] = []
    for grain in range(view.workload.grains):
        if grain in claimed:
            route.append(claimed[grain])
            continue
        chosen = min(members, key=lambda member: ((load[member] + 1) * slowdowns[member], member != planned[grain]))
        load[chosen] += 1
        route.append(chosen)
    return tuple(route)
