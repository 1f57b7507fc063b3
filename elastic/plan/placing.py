"""Places a job's workers in a plan by the network, if the links between its hosts differ.

The search fills stages in the order of the fleet. This order is arbitrary if workers are equal but links are not: members of a stage
exchange gradients, and neighbouring stages exchange activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from elastic.errors import PlanError
from elastic.plan.fleet import Fleet
from elastic.plan.plan import Stage
from elastic.plan.workload import Workload

MOST_WORKERS = 64
"""With more workers, placement takes too long while a recovery waits."""

BUDGET = 200_000
"""Effort of one placement, in pairs of workers: about 10 ms."""


def placed(stages: Sequence[Stage], workload: Workload, fleet: Fleet) -> tuple[Stage, ...] | None:
    """Returns the stages with workers placed by the network; None if that changes nothing or is not known to help.

    It tries this only if links between hosts were measured, workers are equal, and numbers of members differ by at most one.
    """
    widths = [len(stage.members) for stage in stages]
    if len(stages) == 1 or max(widths) - min(widths) > 1 or len(fleet.workers) > MOST_WORKERS:
        return None
    hosts = sorted({fleet.host(worker) for worker in fleet.workers})
    known = any(fleet.site.link(one, other).measured for one, other in combinations(hosts, 2))
    if not known or not fleet.equal or not fleet.memory_alike:
        return None
    from elastic.plan.placement import place  # agents of one host need not load this

    links = {(one, other): fleet.site.link(one, other) for one in hosts for other in hosts}
    at = [fleet.host(worker) for worker in fleet.workers]
    pairs = [[links[one, other] for other in at] for one in at]
    gradients = max(sum(workload.layers[layer].parameter_bytes for layer in stage.layers) for stage in stages)
    activations = max(workload.layers[stage.layers.stop - 1].output_bytes for stage in stages[:-1])
    try:
        found = place(
            np.array([[link.latency_s for link in row] for row in pairs]),
            np.array([[link.bytes_per_s for link in row] for row in pairs]),
            len(stages),
            gradients,
            activations * workload.micro_batches / min(widths),
            budget=BUDGET,
        )
    except PlanError:
        return None
    groups = [tuple(fleet.workers[place] for place in sorted(group)) for group in found.groups]
    for ordered in (groups, groups[::-1]):  # both directions cost the same
        if [len(group) for group in ordered] == widths:
            new = tuple(replace(stage, members=group) for stage, group in zip(stages, ordered, strict=True))
            return None if new == tuple(stages) else new
    return None
