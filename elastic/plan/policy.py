"""By which rules a schedule is made: whether backwards are split, in which order micro-batches go, and how many a worker may hold.

A worker's backwards, and the parts for weights, are in the order of its forwards, so all three ascend within a grain, whose gradients are
folded in that order: a grain has one worker at each stage, and links keep the order of what they carry.

No policy can deadlock, whatever the bounds of at least one:

- Where all workers follow one ranking of the micro-batches ("ascending", "dealt"), those ranked before the first unfinished one have left
  every worker, and none ranked behind it can be at a worker that has not had it, so whoever must run it next is free to do so.
- Where forwards go as inputs arrive ("arriving"), from the last stage down: a worker of the last stage can always end what it began; if
  those of stage s + 1 end all that they begin, they become free for all that stage s sends them, so what a worker of stage s has begun
  comes back, the first of it too.
- Parts for weights wait for nobody, so they make room when they must.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from elastic.errors import PlanError

Order = Literal["ascending", "dealt", "arriving"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The rules of `schedule.build`. Raises PlanError on bounds below one and on negative patience.

    `order` of the forwards: "ascending"; "dealt" in turn to the members of the widest stage (see `ranking`); or "arriving", whichever input
    is there first, and as dealt among several.
    `first`: which of a forward and a backward, when both could start. Up to the bounds, "forward" is faster where stages are not equal.
    `in_flight`: for each stage, the most micro-batches at a worker between the begin of the forward and the end of the backward or its
    input part; None is 1F1B's, S - s at stage s of S.
    `split`: backwards are split, and the parts for weights run when nothing else can.
    `held`: for each stage, the most micro-batches at a worker between the begin of the forward and the end of the last part of the
    backward: whose activations take memory. None is the same as `in_flight`.
    `patience`: a worker that knows of something to do within this share of the time of a part for weights waits for that instead.
    """

    order: Order = "ascending"
    first: Literal["backward", "forward"] = "backward"
    in_flight: tuple[int, ...] | None = None
    split: bool = False
    held: tuple[int, ...] | None = None
    patience: float = 0.5

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise PlanError(f"micro-batches go in one of the orders {get_args(Order)}, not {self.order!r}")
        if self.first not in ("backward", "forward"):
            raise PlanError(f"first is 'backward' or 'forward', not {self.first!r}")
        if not self.patience >= 0:
            raise PlanError(f"patience is a share of a time, and cannot be {self.patience}")
        for name in ("in_flight", "held"):
            if any(bound < 1 for bound in getattr(self, name) or ()):
                raise PlanError(f"{name} must be at least one micro-batch at every stage, not {getattr(self, name)}")

    def bounds(self, depth: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """In flight and held at each of `depth` stages; raises PlanError if the policy is for another number of stages."""
        in_flight = classic_bounds(depth) if self.in_flight is None else self.in_flight
        held = in_flight if self.held is None else self.held
        if len(in_flight) != depth or len(held) != depth:
            raise PlanError(f"the policy bounds {len(in_flight)} and {len(held)} stages, and the plan has {depth}")
        return tuple(map(min, in_flight, held)), held


ONE_F_ONE_B = Policy()
"""1F1B (Narayanan et al., "PipeDream", 2019, with a flush), for any stages."""


def classic_bounds(depth: int) -> tuple[int, ...]:
    """1F1B's: S - s micro-batches at stage s of S, which just keep equal stages of equal width busy."""
    return tuple(depth - stage for stage in range(depth))


def busy_bounds(widths: Sequence[int]) -> tuple[int, ...]:
    """What keeps stages of any `widths` busy when each stage's time is in proportion to its width: the same as 1F1B's for equal ones.

    A worker of stage s needs its share of the micro-batches that all workers from there on compute at once, which takes that much memory.
    """
    return tuple(-(-sum(widths[stage:]) // width) for stage, width in enumerate(widths))


def ranking(order: Order, worker: Sequence[Sequence[int]]) -> list[int]:
    """All micro-batches in the order in which every worker takes its own; `worker[stage][micro_batch]`.

    "dealt": each worker of the stage that uses most of them gets its first one, then each its second, and so on; one that has fewer gets
    them at larger intervals. So a narrow stage serves all workers of a wide one in turn, instead of one after the other, at the price of
    more folds open at a time (`schedule.open_folds`). Ascends within a grain.
    """
    count = len(worker[0])
    if order == "ascending":
        return list(range(count))
    widest = max(worker, key=lambda row: len(set(row)))
    shares, dealt = Counter(widest), Counter[int]()
    places: list[tuple[float, int]] = []
    for micro_batch, to in enumerate(widest):
        places.append((dealt[to] / shares[to], micro_batch))
        dealt[to] += 1
    return [micro_batch for _, micro_batch in sorted(places)]
