"""What of an interrupted step need not be computed again, and how the next view takes the rest of it. Pure.

A grain is finished at a stage if a worker has the sums of its gradients: a member of the stage, or a worker that has died and left them in
its segment; then a member of the stage on the same host, its *heir*, takes them over. Grains that every stage has finished are not computed
again. In the interrupted step the others are routed anew: to whoever has sums that cover them, else to whoever has begun them, else to the
member that would finish them first. Later steps follow the plan.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from elastic.plan.plan import Stage
from elastic.recovery.inventory import FinishedGrains, Inventory
from elastic.view import View

_FORWARD = 1 / 3
"""The part of a micro-batch's computation that its forward is: a backward multiplies twice as many matrices."""

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
    worker, finished = inventory.worker, inventory.finished_of(step)
    if worker not in view.workers or finished is None:
        return False
    stage = view.plan.stage_of(worker)
    return covers(finished, view.plan.stages[stage].layers) and all(routes[stage][grain] == worker for grain in finished.held)


def covers(finished: FinishedGrains, layers: range) -> bool:
    """Returns whether there are sums of all these layers."""
    return bool(finished.grains) and finished.layers.start <= layers.start and layers.stop <= finished.layers.stop


def restart(
    view: View, step: int, inventories: Mapping[int, Inventory], offers: Sequence[Inventory] = (), hosts: Mapping[int, str] | None = None
) -> Restart:
    """Returns how `view` takes step `step`. `hosts` are those of the dead workers whose `offers` may be used."""
    here = {member.worker: member.host for member in view.members}
    dead = [offer for offer in offers if offer.worker in (hosts or {})]
    stages = [_Claims(stage, inventories, step) for stage in view.plan.stages]
    for claims in stages:
        for offer in dead:
            claims.inherit(offer, step, (hosts or {})[offer.worker], here)
    finished = set(range(view.workload.grains)).intersection(*(claims.done for claims in stages))
    for claims in stages:
        claims.renounce(finished)
    if not finished and not any(claims.begun for claims in stages):
        return Restart(routes=view.plan.routes)
    routes = tuple(_routes(view, number, claims) for number, claims in enumerate(stages))
    heirs = tuple((worker, heir) for claims in stages for worker, (heir, _) in claims.heirs.items())
    return Restart(routes=routes, finished=tuple(sorted(finished)), heirs=heirs)


class _Claims:
    """Which members of a stage hold sums or a part of the computation of which grains."""

    def __init__(self, stage: Stage, inventories: Mapping[int, Inventory], step: int) -> None:
        self._stage = stage
        self.claimed: dict[int, int] = {}  # the member that has sums of a grain, or will have them as an heir
        self.done: set[int] = set()
        self.heirs: dict[int, tuple[int, FinishedGrains]] = {}
        self.begun: dict[int, int] = {}
        for worker in stage.members:
            found = inventories[worker].finished_of(step) if worker in inventories else None
            if found is None:
                continue
            self._claim(worker, found)
            if set(found.layers) & set(stage.layers):
                self.begun |= dict.fromkeys(found.begun, worker)

    def _claim(self, member: int, found: FinishedGrains | None) -> FinishedGrains | None:
        if found is None or not covers(found, self._stage.layers) or self.claimed.keys() & found.held:
            return None
        self.claimed |= dict.fromkeys(found.held, member)
        self.done |= set(found.grains)
        return found

    def inherit(self, offer: Inventory, step: int, host: str, hosts: Mapping[int, str]) -> None:
        """Gives the sums of a dead worker to the member on its host that has fewest."""
        near = [worker for worker in self._stage.members if hosts[worker] == host]
        heir = min(near, key=lambda worker: sum(1 for other in self.claimed.values() if other == worker), default=None)
        if heir is not None and (found := self._claim(heir, offer.finished_of(step))) is not None:
            self.heirs[offer.worker] = heir, found

    def renounce(self, finished: Collection[int]) -> None:
        """Drops sums of the dead without a grain that is `finished`: others are computed again, since neighbours need their results."""
        for dead, (_, found) in list(self.heirs.items()):
            if not set(found.grains) & set(finished):
                del self.heirs[dead]
                self.claimed = {grain: member for grain, member in self.claimed.items() if grain not in found.held}


def _routes(view: View, number: int, claims: _Claims) -> tuple[int, ...]:
    """Returns the routes of one stage: each grain goes to the member that holds most of it, others to the one that would finish them first.

    Among equals it is the plan's own.
    """
    members, planned, slowdowns = view.plan.stages[number].members, view.plan.routes[number], view.slowdowns
    found = {**claims.begun, **claims.claimed}
    load = {member: sum(1 - _FORWARD for grain in claims.begun.keys() - claims.claimed if found[grain] == member) for member in members}
    for grain in range(view.workload.grains):
        if grain not in found:
            found[grain] = min(members, key=lambda member: ((load[member] + 1) * slowdowns[member], member != planned[grain]))
            load[found[grain]] += 1
    return tuple(found[grain] for grain in range(view.workload.grains))
