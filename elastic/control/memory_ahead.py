"""Lets workers prepare memory for the next view while they still train in this one."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from elastic.control.spares import joiners
from elastic.errors import ElasticError

if TYPE_CHECKING:
    from elastic.control.state import ControlState
    from elastic.control.world import Terms, World


def prepare_memory(world: World, state: ControlState, terms: Terms) -> None:
    """Tells each worker how much memory it will need when the ready workers join.

    It is an estimate, so an error is left to the proposal, which searches the same plan.
    """
    with suppress(ElasticError):
        needed = world.expect(
            last=state.view,
            joiners={worker: state.ready[worker] for worker in joiners(state, at_boundary=True)},
            slowdowns=state.slowdowns,
            stages=terms.stages,
            links=terms.links,
            prepared=terms.prepared,
        )
        for worker, size in needed.items():
            if size:
                world.carrier.tell([worker], {"type": "prepare", "bytes": size})
