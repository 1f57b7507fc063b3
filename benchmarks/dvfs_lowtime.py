"""Compares one static clock a stage with Perseus's `lowtime`, in which each computation has a clock of its own (pip install lowtime).

The pipeline and GPUs are those of the frontier in `dvfs.py`: four stages, a published network each, on Zeus's power sweeps; the order of
computations is that of the schedule at the usual clocks. Energies contain the idle GPUs. `lowtime` gets straight lines between the points
of the convex hull of each computation's times and energies (its own curve, an exponential, does not fit some of these sweeps), and rounds
back to settings; its seconds and joules here are those of the settings, run in the same order.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import networkx as nx  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.dvfs import NETWORKS, SECONDS, parts, pipeline  # noqa: E402
from benchmarks.zeus_profiles import GPUS, choices_of, load  # noqa: E402
from elastic.plan.clock_search import ClockSearch  # noqa: E402
from elastic.plan.clocks import ClockChoices  # noqa: E402
from elastic.plan.schedule import build  # noqa: E402

UNIT_S = 0.001
MICRO_BATCHES = 8


def _specs(choices: ClockChoices, seconds: float, lowtime: Any) -> dict[str, Any]:
    """Returns the options of a stage's forward and backward."""
    found = {}
    for kind, share in (("F", 1 / 3), ("B", 2 / 3)):
        options = lowtime.CandidateExecutionOptions(
            options=[
                lowtime.ExecutionOption(
                    real_time=seconds * share * point.stretch,
                    unit_time=UNIT_S,
                    cost=seconds * share * point.stretch * (point.watts - choices.idle_w),
                    knob=point,
                )
                for point in choices.useful
            ]
        )
        found[kind] = lowtime.OperationSpec(options=options, cost_model=lowtime.Straight(options.options))
    return found


def _graph(choices: list[ClockChoices], lowtime: Any) -> tuple[Any, list[Any], dict[Any, list[Any]]]:
    """Returns the graph of all computations, their operations in order of the schedule, and what each waits for."""
    actions = build(*parts(SECONDS, MICRO_BATCHES))
    specs = [_specs(each, seconds, lowtime) for each, seconds in zip(choices, SECONDS, strict=True)]
    keys = [(stage, action.kind, action.micro_batch) for stage in range(len(choices)) for action in actions[stage]]
    operations = {key: lowtime.Operation(specs[key[0]][key[1]]) for key in keys}
    waits: dict[Any, list[Any]] = {key: [] for key in keys}
    for stage in range(len(choices)):
        mine = [key for key in keys if key[0] == stage]
        for before, after in pairwise(mine):
            waits[after].append(before)
    for stage, kind, micro_batch in keys:
        near = stage - 1 if kind == "F" else stage + 1
        if 0 <= near < len(choices):
            waits[stage, kind, micro_batch].append((near, kind, micro_batch))
    return operations, keys, waits


def _judged(operations: Any, waits: dict[Any, list[Any]], choices: list[ClockChoices]) -> tuple[float, float]:
    """Returns seconds and joules of a step with the settings that are assigned now."""
    end: dict[Any, float] = {}

    def ends(key: Any) -> float:
        if key not in end:
            share = SECONDS[key[0]] * (1 / 3 if key[1] == "F" else 2 / 3)
            end[key] = max((ends(each) for each in waits[key]), default=0.0) + share * operations[key].assigned_knob.stretch
        return end[key]

    step_s = max(ends(key) for key in operations)
    joules = sum(each.idle_w for each in choices) * step_s
    for stage, kind, micro_batch in operations:
        knob = operations[stage, kind, micro_batch].assigned_knob
        joules += SECONDS[stage] * (1 / 3 if kind == "F" else 2 / 3) * knob.stretch * (knob.watts - choices[stage].idle_w)
    return step_s, joules


def _above(one: tuple[int, float], other: tuple[int, float], third: tuple[int, float]) -> bool:
    """Whether `other` lies above the line from `one` to `third`, or on it."""
    return (other[1] - one[1]) * (third[0] - one[0]) >= (third[1] - one[1]) * (other[0] - one[0])


def compared(gpu: str) -> dict[str, Any]:
    """Returns, for one kind of GPU, joules of static clocks over those of lowtime at the same step times."""
    from types import SimpleNamespace

    from lowtime import cost_model, operation, solver  # pyright: ignore[reportMissingImports]

    class Straight(cost_model.CostModel):
        """Straight lines between the points of the convex hull, by quantised time."""

        def __init__(self, options: list[Any]) -> None:
            hull: list[tuple[int, float]] = []
            for point in sorted((option.quant_time, option.cost) for option in options):
                while len(hull) > 1 and _above(hull[-2], hull[-1], point):
                    hull.pop()
                hull.append(point)
            self.hull = hull

        def __call__(self, quant_time: int) -> float:
            return float(np.interp(quant_time, [each[0] for each in self.hull], [each[1] for each in self.hull]))

    lowtime = SimpleNamespace(**{**vars(operation), "Straight": Straight})
    sweeps = load()
    choices = [choices_of(gpu, sweeps[gpu, network]) for network in NETWORKS]
    operations, keys, waits = _graph(choices, lowtime)
    graph = nx.DiGraph()
    numbers = {key: number + 1 for number, key in enumerate(keys)}
    graph.add_node(0, op=operation.DummyOperation())
    graph.add_node(len(keys) + 1, op=operation.DummyOperation())
    for key in keys:
        graph.add_node(numbers[key], op=operations[key])
    for key in keys:
        for before in waits[key]:
            graph.add_edge(numbers[before], numbers[key])
    for number in numbers.values():
        if not graph.in_degree(number):
            graph.add_edge(0, number)
        if not graph.out_degree(number):
            graph.add_edge(number, len(keys) + 1)
    graph.graph["source_node"], graph.graph["sink_node"] = 0, len(keys) + 1
    began, theirs = time.perf_counter(), []
    for _ in solver.PhillipsDessouky(graph).run():
        theirs.append(_judged(operations, waits, choices))
    theirs_s = time.perf_counter() - began
    search, began = ClockSearch(pipeline(SECONDS, MICRO_BATCHES), choices), time.perf_counter()
    ours = search.frontier()
    ours_s = time.perf_counter() - began
    over = []
    for point in ours:
        within = [joules for step_s, joules in theirs if step_s <= point.step_s * (1 + 1e-9)]
        if within:
            over.append(point.joules / min(within) - 1)
    return {
        "gpu": gpu,
        "points": len(over),
        "static_over_lowtime": over,
        "lowtime_s": theirs_s,
        "ours_s": ours_s,
        "iterations": len(theirs),
    }


def main() -> None:
    """Prints JSON."""
    parser = argparse.ArgumentParser(description="One static clock a stage, next to lowtime.")
    parser.add_argument("--gpus", nargs="*", default=list(GPUS))
    print(json.dumps([compared(gpu) for gpu in parser.parse_args().gpus], indent=1))


if __name__ == "__main__":
    main()
