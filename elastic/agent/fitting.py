"""Whether the model fits into the memory of other members than those of the present view."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from elastic.errors import PlanError
from elastic.host.facts import HostFacts
from elastic.plan.fleet import SHARE, Fleet
from elastic.plan.memory import readable
from elastic.plan.planner import plan
from elastic.plan.site import Site

if TYPE_CHECKING:
    from elastic.control.driver import Driver
    from elastic.settings import JobSettings
    from elastic.view import Member, View


def misfit_with(view: View, settings: JobSettings, host: str, facts: HostFacts, room: int) -> str | None:
    """Returns why the model does not fit once a host with so many workers has joined; None if it does, or its memory is unknown."""
    if facts.memory is None:
        return None
    like, number = view.members[0], max(view.workers) + 1
    joiners = [replace(like, worker=number + each, host=host, memory=settings.memory, slowdown=1.0) for each in range(room)]
    why = _misfit(view, settings, [*view.members, *joiners], view.site.having(Site(memory={host: facts.memory})))
    share = f"{room} worker{'s' * (room != 1)} share {readable(SHARE * facts.memory)} there"
    return None if why is None else f"{share}, and with them {why}"


def misfit_without(driver: Driver, settings: JobSettings, leaving: Iterable[int]) -> str | None:
    """Returns why the model does not fit once these workers have left, with spares in their places; None if it does."""
    view, state, gone = driver.view, driver.state, frozenset(leaving)
    if gone.isdisjoint(view.workers):
        return None  # the members stay as they are
    staying = [member for member in view.members if member.worker not in gone]
    spares = [state.ready[worker] for worker in sorted(state.spares - state.unable - gone) if worker in state.ready]
    return _misfit(view, settings, [*staying, *spares][: len(view.members)], view.site)


def _misfit(view: View, settings: JobSettings, members: Sequence[Member], site: Site) -> str | None:
    try:
        plan(Fleet.of(members, site), view.workload, view.plan, stages=settings.stages)
    except PlanError as error:
        return str(error)
    return None
