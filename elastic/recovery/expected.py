"""Estimates, before members join, how much memory each worker will need for its place in the next view, so that it can prepare it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from elastic.layout.regions import ITEMSIZE
from elastic.plan.fleet import Fleet
from elastic.plan.planner import Answers, plan
from elastic.plan.site import LinkSpeed, Pair
from elastic.recovery.proposal import next_members, next_view

if TYPE_CHECKING:
    from elastic.layout.layout import Layout
    from elastic.plan.workload import Workload
    from elastic.view import Member, View


def memory_needed(
    *,
    last: View,
    joiners: Mapping[int, Member],
    stages: int | None,
    slowdowns: Mapping[int, float] | None = None,
    links: Mapping[Pair, LinkSpeed] | None = None,
    prepared: Answers | None = None,
) -> dict[int, int]:
    """Returns the bytes of new state by worker, if `joiners` join all members of `last` and nothing else happens before.

    The arguments are those of `recovery.proposal.propose`, which searches the same plan again once it has the inventories.
    """
    members, site = next_members(last, last.workers, joiners, slowdowns or {}), last.site.knowing(links or {})
    planned = plan(Fleet.of(members, site), last.workload, last.plan, stages=stages, prepared=prepared)
    layout = next_view(last, last.attempt, members, planned.plan, site).layout
    return {member.worker: round(_new_bytes(member.worker, last.layout, layout, last.workload)) for member in members}


def _new_bytes(worker: int, before: Layout, after: Layout, workload: Workload) -> float:
    """Returns the bytes of parameters, optimizer state and previous copies that a worker did not have in the layout before."""
    gathered = set(after.layers_of(worker)).difference(before.layers_of(worker))
    total = float(sum(_parameter_bytes(after, layer, workload) for layer in gathered))
    known = {(layer, interval.start, interval.stop) for layer, interval in before.owned(worker)}
    for layer, interval in after.owned(worker):
        if (layer, interval.start, interval.stop) not in known:
            spec = after.model.layers[layer]
            if not spec.frozen:
                states = workload.state_bytes_of(spec.module) * spec.size / max(1, workload.layers[spec.module].parameters)
                total += interval.elements / max(1, spec.size) * (2 * states + _parameter_bytes(after, layer, workload))
    return total


def _parameter_bytes(layout: Layout, layer: int, workload: Workload) -> float:
    spec = layout.model.layers[layer]
    alone = spec.part_of is None and len(layout.model.parts[layer]) == 1
    return workload.layers[layer].parameter_bytes if alone else spec.size * ITEMSIZE[spec.dtype] if spec.size else 0
