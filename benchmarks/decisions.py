"""Measures how long the pure parts of planning and recovery take, on one processor:

    python benchmarks/decisions.py [--repeat 9] [--json FILE]

Prints one JSON object: the median CPU milliseconds of each decision, and values that grow with workers and parameters (`growth.py`).
It runs no job.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from growth import COUNTS, GROWTH, Decide
from report import write_json

from elastic.layout.layout import spread
from elastic.layout.regions import LayerSpec, ModelSpec
from elastic.plan.assignment import assign
from elastic.plan.fleet import Fleet
from elastic.plan.plan import Plan, Stage
from elastic.plan.planner import fastest
from elastic.plan.relabel import ByteRange, relabel
from elastic.plan.routing import even_routes
from elastic.plan.sending import balance, missing
from elastic.plan.simulation import judge
from elastic.plan.timing import Timing
from elastic.plan.workload import LayerCost, Workload


def _workload(layers: int, micro_batches: int) -> Workload:
    costs = tuple(LayerCost(forward_s=0.01 + 0.001 * i, backward_s=0.02, parameters=1000, activation_bytes=0) for i in range(layers))
    return Workload(layers=costs, micro_batches=micro_batches, grains=micro_batches)


def _stages(layers: int, widths: list[int], first: int = 0) -> tuple[Stage, ...]:
    """Divides the layers into equal parts; workers are in ascending order."""
    found: list[Stage] = []
    for number, width in enumerate(widths):
        here = range(layers * number // len(widths), layers * (number + 1) // len(widths))
        found.append(Stage(layers=here, members=tuple(range(first, first + width))))
        first += width
    return tuple(found)


def _plan(layers: int, widths: list[int], first: int = 0) -> Plan:
    stages = _stages(layers, widths, first)
    return Plan(stages=stages, routes=tuple(even_routes(32, stage.members) for stage in stages), step_s=0.0, why="")


def planning() -> Decide:
    fleet, workload = Fleet(workers=tuple(range(8))), _workload(10, 16)
    return lambda: fastest(fleet, workload)


def judging() -> Decide:
    stages, workload = _stages(16, [8] * 16), _workload(16, 128)
    routes = tuple(even_routes(128, stage.members) for stage in stages)
    timing = Timing.of(workload, stages).linked([0.5] * 15, [0.5] * 15)
    return lambda: judge(workload, stages, routes, timing=timing)


def assigning() -> Decide:
    old, new = _plan(128, [20] * 15 + [4]), _plan(128, [24] * 12 + [15], first=1)
    return lambda: assign(new, old, [1] * 128)


def _zero(stages: int, width: int, layers: int, size: int, lost: int) -> tuple[dict[int, list[ByteRange]], list[list[ByteRange]]]:
    """Returns what workers hold, and what is needed without one of them: whole layers, a share of their states, and a neighbour's."""

    def share(rank: int, of: int, layer: int) -> ByteRange:
        return ByteRange(1000 + layer, size * (rank % of) // of * 3, size * (rank % of + 1) // of * 3)

    def needs(stage: int, rank: int, of: int) -> list[ByteRange]:
        here = range(stage * layers, (stage + 1) * layers)
        return [piece for layer in here for piece in {ByteRange(layer, 0, size), share(rank, of, layer), share(rank + 1, of, layer)}]

    held = {stage * width + rank: needs(stage, rank, width) for stage in range(stages) for rank in range(width)}
    del held[lost]
    widths = [width - (lost // width == stage) for stage in range(stages)]
    return held, [needs(stage, rank, widths[stage]) for stage in range(stages) for rank in range(widths[stage])]


def relabelling() -> Decide:
    held, slots = _zero(16, 32, 8, 50_000_000, 37)
    return lambda: relabel(held, slots)


def balancing() -> Decide:
    held, slots = _zero(16, 32, 8, 50_000_000, 37)
    found = relabel(held, slots)
    return lambda: balance(missing(held, dict(zip(found.workers, slots, strict=True))), dict.fromkeys(held, 1e9), block=4096)


def _model(layers: int, size: int) -> ModelSpec:
    return ModelSpec(layers=tuple(LayerSpec.build(i, [("weight", (size,), "float32")]) for i in range(layers)))


def spreading() -> Decide:
    model = _model(100, 20_000_000)
    return lambda: spread(model, [(range(50), range(32)), (range(50, 100), range(32, 64))])


def respreading() -> Decide:
    model = _model(40, 4000 * 4096)
    before = spread(model, [(range(20), range(32)), (range(20, 40), range(32, 64))])
    return lambda: spread(model, [(range(20), [*range(13), *range(14, 32)]), (range(20, 40), range(32, 64))], near=before)


DECISIONS: dict[str, Callable[[], Decide]] = {
    "plan: 10 layers, 8 workers": planning,
    "simulated step: 16 stages of 8 workers, 128 micro-batches": judging,
    "workers to stages: 303 workers, 128 layers": assigning,
    "workers to shards: 511 workers after a loss": relabelling,
    "who sends what: 511 workers after a loss": balancing,
    "layout: 100 layers, 64 workers": spreading,
    "layout after a loss: 40 layers, 63 workers": respreading,
    **GROWTH,
}


def median_ms(decide: Decide, repeat: int) -> float:
    """Returns the median CPU time, which other processes on the machine distort less."""
    taken: list[float] = []
    for _ in range(repeat):
        began = time.process_time()
        decide()
        taken.append(time.process_time() - began)
    return round(1000 * statistics.median(taken), 2)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--repeat", type=int, default=9, help="number of runs of each decision")
    ask.add_argument("--json", type=Path, metavar="FILE", help="also write the result to this file")
    chosen = ask.parse_args()
    if chosen.repeat < 1:
        ask.error("--repeat must be at least 1")
    counts = {name: measure() for name, measure in COUNTS.items()}  # first: objects of the decisions slow the garbage collector down
    figures = {name: median_ms(prepare(), chosen.repeat) for name, prepare in DECISIONS.items()}
    found = {**counts, **figures}
    print(json.dumps(found, indent=1))
    write_json(chosen.json, found)


if __name__ == "__main__":
    main()
