"""The cost model of a running job: measured layers, the simulated schedule, and the actual workers and links."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from elastic.plan import dealing
from elastic.plan.fleet import Fleet
from elastic.plan.memory import shortfall
from elastic.plan.plan import Stage
from elastic.plan.prediction import Prediction
from elastic.plan.simulation import simulating
from elastic.plan.timing import Timing
from elastic.plan.workload import Workload

NEAR = 1.25
"""Up to this multiple of the least seconds, no other order is tried than that of micro-batches that are dealt out. Of 561 random layouts
whose stages had work in proportion to their workers, ascending order was best in none, and took twice as long on average."""


@dataclass(frozen=True, slots=True)
class JobCosts:
    """Predicts plans of a job. `stage_s` is the seconds per step of the member that computes longest. Memory: `memory.shortfall`."""

    workload: Workload
    fleet: Fleet

    def predicting(self, stages: Sequence[Stage], routes: Sequence[Sequence[int]]) -> Generator[None, None, Prediction]:
        workload, fleet = self.workload, self.fleet
        timing = self.timing(stages)
        yield
        size = workload.micro_batches // workload.grains
        busy_s = {worker: 0.0 for stage in stages for worker in stage.members}
        for stage, route in zip(stages, routes, strict=True):
            grains = Counter(route)
            seconds = sum(workload.layers[layer].forward_s + workload.layers[layer].backward_s for layer in stage.layers)
            for worker in stage.members:
                busy_s[worker] = seconds * size * grains[worker]
        yield
        stage_s = tuple(max(busy_s[worker] * fleet.slowdown(worker) for worker in stage.members) for stage in stages)
        compute_s, dealt = yield from self._computing(stages, routes, timing)
        yield
        return Prediction(
            compute_s=compute_s,
            exchange_s=self.exchange_s(stages),
            stage_s=stage_s,
            crowded_s=self._crowded_s(busy_s),
            dealt=dealt,
        )

    def _computing(
        self, stages: Sequence[Stage], routes: Sequence[Sequence[int]], timing: Timing
    ) -> Generator[None, None, tuple[float, bool]]:
        """Returns the seconds of the simulated schedule, and whether its micro-batches are dealt out."""
        if not dealing.changes(self.workload, routes) or shortfall(self.workload, stages, routes, self.fleet, dealt=True)[1]:
            return (yield from simulating(self.workload, routes, timing)).seconds, False
        yield
        dealt = yield from simulating(self.workload, routes, timing, dealt=True)
        if dealt.seconds <= NEAR * dealt.least_s:  # the second simulation takes as long again
            return dealt.seconds, True
        ascending = yield from simulating(self.workload, routes, timing)
        return min((ascending.seconds, False), (dealt.seconds, True))

    def timing(self, stages: Sequence[Stage]) -> Timing:
        """Returns the seconds of all actions and messages."""
        return self._linked(Timing.of(self.workload, stages), stages).slowed(self.fleet.slowdowns)

    def exchange_s(self, stages: Sequence[Stage]) -> float:
        """Returns the seconds of the longest exchange of gradients."""
        return max(self._exchange_s(stage) for stage in stages)

    def _linked(self, timing: Timing, stages: Sequence[Stage]) -> Timing:
        """Adds the slowest link of each boundary. A gradient is as large as its activation."""
        seconds = [
            self.fleet.link(below.members, above.members).seconds(self.workload.layers[below.layers.stop - 1].output_bytes)
            for below, above in pairwise(stages)
        ]
        return timing.linked(seconds, seconds) if any(seconds) else timing

    def _exchange_s(self, stage: Stage) -> float:
        """Reduce-scatter and all-gather: each moves (n - 1) / n of the stage's parameters through every worker."""
        size = sum(self.workload.layers[layer].parameter_bytes for layer in stage.layers)
        others = len(stage.members) - 1
        return 2 * self.fleet.link(stage.members, stage.members).seconds(size * others / len(stage.members)) if others else 0.0

    def _crowded_s(self, busy_s: dict[int, float]) -> float:
        """Least seconds on the most crowded host. A worker that is slow for another reason than its neighbours leaves room for them."""
        fleet, total = self.fleet, dict[str, float]()
        for worker, seconds in busy_s.items():
            total[fleet.host(worker)] = total.get(fleet.host(worker), 0.0) + seconds
        return max((seconds / fleet.site.places[host] for host, seconds in total.items() if host in fleet.site.places), default=0.0)
