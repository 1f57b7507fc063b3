"""Zero-bubble schedules, for stages of any cost and width; and the fastest of several policies.

Qi et al., "Zero Bubble Pipeline Parallelism" (2023): only the backward's part for inputs is on the way of other stages, so the part for
weights can wait for a gap. With equal stages of forward f, input part i and weight part w, M micro-batches and S stages a step takes

    1F1B          M (f + i + w) + (S - 1) (f + i + w)
    zero bubble   M (f + i + w) + (S - 1) (f + i)         no stage holds more activations than in 1F1B
    ZB-H1         M (f + i + w) + (S - 1) (f + i - w)     no stage holds more than the first one in 1F1B

the latter for w <= f, w <= i and M >= S. Their schedules are written down for equal stages; these come out of list scheduling with the
same bounds, and stages need not be equal. On equal ones zero bubble takes exactly the time above, and so does ZB-H1 with a patience just
below 1: a part for weights must not begin unless it fits into the gap. The default of 0.5 may take a part or so longer there, but is
faster on unequal stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from elastic.errors import PlanError
from elastic.plan.plan import Stage
from elastic.plan.policy import Order, Policy
from elastic.plan.simulation import simulate
from elastic.plan.timing import Timing
from elastic.plan.workload import Workload


def zero_bubble(order: Order = "ascending", in_flight: Sequence[int] | None = None) -> Policy:
    """No stage holds more activations than `in_flight` micro-batches, by default those of 1F1B."""
    return Policy(order=order, first="forward", split=True, in_flight=None if in_flight is None else tuple(in_flight))


def zb_h1(bounds: Sequence[int], order: Order = "ascending") -> Policy:
    """As many are in flight as in 1F1B, whose `bounds` these are, and every stage may hold as many activations as the greatest of them."""
    return Policy(order=order, first="forward", split=True, in_flight=tuple(bounds), held=(max(bounds),) * len(bounds))


def fastest(
    workload: Workload, stages: Sequence[Stage], routes: Sequence[Sequence[int]], policies: Iterable[Policy], timing: Timing | None = None
) -> tuple[Policy, float]:
    """The policy whose schedule ends first, and the seconds that it takes; the first one of equals. PlanError if there are none."""
    timed = [(policy, simulate(workload, stages, routes, policy=policy, timing=timing)[1]) for policy in policies]
    if not timed:
        raise PlanError("the fastest of no policies was asked for: give at least one")
    return min(timed, key=lambda each: each[1])
