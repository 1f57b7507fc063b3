"""What a step of a plan is predicted to take, and which stage the others wait for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from elastic.plan.fleet import Fleet
from elastic.plan.plan import Stage
from elastic.plan.simulation import simulating
from elastic.plan.slicing import finish
from elastic.plan.timing import Timing
from elastic.plan.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Seconds: of the simulated schedule with its messages, of the exchange of gradients and parameters where it takes longest, and, by
    stage, of the worker there that computes longest.

    `crowded_s` is the least that hosts need which cannot compute for all of their workers at the same time, 0 without such a host.
    """

    compute_s: float
    exchange_s: float
    stage_s: tuple[float, ...]
    crowded_s: float

    @property
    def apart_s(self) -> float:
        """Of a step, if every worker computes on something of its own."""
        return self.compute_s + self.exchange_s

    @property
    def step_s(self) -> float:
        """Of a step, where it is computed."""
        return max(self.compute_s, self.crowded_s) + self.exchange_s

    @property
    def bottleneck(self) -> int:
        """The stage that computes longest, the first of equals."""
        return max(range(len(self.stage_s)), key=lambda number: self.stage_s[number])


def predict(stages: Sequence[Stage], routes: Sequence[Sequence[int]], workload: Workload, fleet: Fleet) -> Prediction:
    """The simulated schedule for workers and links as they are."""
    return finish(predicting(stages, routes, workload, fleet))


def predicting(
    stages: Sequence[Stage], routes: Sequence[Sequence[int]], workload: Workload, fleet: Fleet
) -> Generator[None, None, Prediction]:
    """`predict`, which can be left off every few milliseconds."""
    timing = _linked(Timing.of(workload, stages), workload, stages, fleet).slowed(fleet.slowdowns)
    size = workload.micro_batches // workload.grains
    busy_s = {worker: 0.0 for stage in stages for worker in stage.members}
    for stage, route in zip(stages, routes, strict=True):
        grains = Counter(route)
        seconds = sum(workload.layers[layer].forward_s + workload.layers[layer].backward_s for layer in stage.layers)
        for worker in stage.members:
            busy_s[worker] = seconds * size * grains[worker]
    yield
    compute_s = yield from simulating(workload, routes, timing)
    return Prediction(
        compute_s=compute_s,
        exchange_s=max(_exchange_s(workload, stage, fleet) for stage in stages),
        stage_s=tuple(max(busy_s[worker] * fleet.slowdown(worker) for worker in stage.members) for stage in stages),
        crowded_s=_crowded_s(busy_s, fleet),
    )


def _linked(timing: Timing, workload: Workload, stages: Sequence[Stage], fleet: Fleet) -> Timing:
    """With the slowest link of each boundary; a gradient is as large as the activation that it is of."""
    seconds = [
        fleet.link(below.members, above.members).seconds(workload.layers[below.layers.stop - 1].output_bytes)
        for below, above in pairwise(stages)
    ]
    return timing.linked(seconds, seconds) if any(seconds) else timing


def _exchange_s(workload: Workload, stage: Stage, fleet: Fleet) -> float:
    """Reduce-scatter and all-gather: each moves (n - 1) / n of the stage's parameters through every worker."""
    size = sum(workload.layers[layer].parameter_bytes for layer in stage.layers)
    others = len(stage.members) - 1
    return 2 * fleet.link(stage.members, stage.members).seconds(size * others / len(stage.members)) if others else 0.0


def _crowded_s(busy_s: dict[int, float], fleet: Fleet) -> float:
    """Workers that are slower for another reason than the host's others leave room for these."""
    total: dict[str, float] = {}
    for worker, seconds in busy_s.items():
        total[fleet.host(worker)] = total.get(fleet.host(worker), 0.0) + seconds
    return max((seconds / fleet.site.places[host] for host, seconds in total.items() if host in fleet.site.places), default=0.0)
