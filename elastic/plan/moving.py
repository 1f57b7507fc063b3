"""Estimates the cost of a change of plan from the two plans alone: the bytes that each worker receives, and the seconds.

The exact transfers follow from layouts and inventories. The estimate assumes that ownership is spread evenly, and copies too: each of n
workers keeps r / (n - 1) of what another one owns, if there are r replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elastic.plan.fleet import Fleet
from elastic.plan.plan import Plan, Stage
from elastic.plan.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Moving:
    """Bytes that all workers receive in total, and seconds until the one that receives most has them over its slowest link."""

    bytes: float
    seconds: float


def moving(old: Plan, new: Sequence[Stage], workload: Workload, fleet: Fleet) -> Moving:
    """Estimates the change from `old`, some of whose workers may be gone, to the stages `new`, whose workers are `fleet`."""
    received = {worker: 0.0 for stage in new for worker in stage.members}
    before = {layer: held for stage in old.stages for held in (frozenset(stage.members),) for layer in stage.layers}
    known = set(old.workers)
    replicas = max(1, fleet.replicas)
    lacked = max(0.0, 1 - replicas / (len(known) - 1)) if len(known) > 1 else 0.0
    for stage in new:
        share = 1 / len(stage.members)
        for layer in stage.layers:
            parameters = workload.layers[layer].parameter_bytes + workload.layers[layer].frozen_bytes
            states = workload.state_bytes_of(layer)
            held = len(before[layer])
            for worker in stage.members:
                more = share - 1 / held if worker in before[layer] else share
                size = max(0.0, more) * states + (0 if worker in before[layer] else parameters)
                received[worker] += size * (lacked if worker in known else 1.0)
    if len(received) > 1:  # otherwise no worker is left to keep the copies that the lost ones had
        lost = len(known.difference(received)) / len(known)
        layers = enumerate(workload.layers)
        whole = sum(layer.parameter_bytes + layer.frozen_bytes + workload.state_bytes_of(number) for number, layer in layers)
        for worker in received:
            received[worker] += lost * replicas * whole / len(received)
    most: dict[str, float] = {}  # by host: its workers have the same links
    for worker, size in received.items():
        most[fleet.host(worker)] = max(size, most.get(fleet.host(worker), 0.0))
    hosts = {fleet.host(worker) for worker in fleet.workers}
    seconds = max(fleet.site.slowest({host}, hosts).seconds(size) for host, size in most.items())
    return Moving(bytes=sum(received.values()), seconds=seconds)
