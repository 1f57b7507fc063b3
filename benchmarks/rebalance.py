"""Slows one of two workers down and measures how much faster a step becomes when work is shifted away from it.

    python benchmarks/rebalance.py --factor 3 --stages 1 --stages 2 --json build/rebalance.json

With one stage, the slow worker gets fewer grains. With two, it is alone in its stage and gets fewer layers.

The worker at place 1 is stopped and continued in turns, so that it runs 1/factor of the time. Each worker is pinned to its own core.
Each job runs undisturbed, slowed with the even plan, and slowed with rebalancing: digests and losses must be equal. A figure is the
median time of the steps after the change of the plan, and of the same steps of the other jobs.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from report import write_json
from rich.console import Console
from rich.table import Table

import elastic
from elastic.chaos.throttle import Throttle

sys.path.append(str(Path(__file__).resolve().parents[1]))

from examples import gpt

OPTIONS = {
    "layers": 8,
    "dim": 256,
    "heads": 8,
    "seq": 128,
    "batch": 32,
    "micro_batch": 4,
    "dropout": 0.1,
    "clip": 1.0,
}
TOKENS = OPTIONS["batch"] * OPTIONS["seq"]
app = typer.Typer(add_completion=False)


def train(job: elastic.Job, options: dict[str, Any]) -> dict[str, Any] | None:
    """Trains the example's GPT, pinned to one core."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[job.worker % len(cores)]})
    return gpt.train(job, options)


def run(steps: int, factor: float, stages: int, *, rebalance: bool) -> dict[str, Any]:
    """Runs one job; returns seconds of each step, losses, digest, and the changes of the plan."""
    with tempfile.TemporaryDirectory(prefix="elastic-bench-") as directory:
        with Throttle(directory, {1: factor}) if factor > 1 else nullcontext() as throttle:
            result = elastic.run(
                train, workers=2, stages=stages, args=[{**OPTIONS, "steps": steps}], directory=directory, rebalance=rebalance, respawn=False
            )
        cycles = 0 if throttle is None else throttle.cycles
    value = result.value
    return {
        "seconds": [TOKENS / rate for rate in value["tokens_per_second"]],
        "losses": value["losses"],
        "digest": value["digest"],
        "cycles": cycles,
        "changes": [found for found in result.incidents if found["kind"] == "rebalance"],
        "micro_batches": {str(each["worker"]): next(iter(each["micro_batches"].values())) for each in value["workers"]},
        "layers": {str(each["worker"]): len(each["layers"]) for each in value["workers"]},
    }


def measured(steps: int, factor: float, stages: int) -> dict[str, Any]:
    """Runs the three jobs with this number of stages and returns their figures."""
    calm = run(steps, 1.0, stages, rebalance=False)
    even = run(steps, factor, stages, rebalance=False)
    shifted = run(steps, factor, stages, rebalance=True)
    for name, slowed in (("even", even), ("shifted", shifted)):
        if not slowed["cycles"]:
            raise SystemExit(f"{name}: the worker was not slowed down")
        if (slowed["digest"], slowed["losses"]) != (calm["digest"], calm["losses"]):
            raise SystemExit(f"{name}: digest or losses differ from those of the undisturbed run")
    if not shifted["changes"]:
        raise SystemExit(f"no work was shifted in {steps} steps: use more steps")
    first = shifted["changes"][-1]["step"] + 2  # the first step of the new view includes the change
    medians = {name: statistics.median(each["seconds"][first:]) for name, each in (("calm", calm), ("even", even), ("shifted", shifted))}
    return {
        "factor": factor,
        "stages": stages,
        "calm_step_s": medians["calm"],
        "even_step_s": medians["even"],
        "shifted_step_s": medians["shifted"],
        "ratio": medians["even"] / medians["shifted"],
        "steps_measured": steps - first,
        "changed_after_steps": [change["step"] for change in shifted["changes"]],
        "why": [change["why"] for change in shifted["changes"]],
        "running_again_ms": [change["running_ms"] for change in shifted["changes"]],
        "bytes_moved": [change["bytes_moved"] for change in shifted["changes"]],
        "micro_batches_of_last_view": shifted["micro_batches"],
        "layers_of_last_view": shifted["layers"],
        "digests_equal": True,
        "digest": calm["digest"],
        "runs": {"calm": calm, "even": even, "shifted": shifted},
    }


@app.command()
def main(
    factor: Annotated[float, typer.Option(help="How many times slower worker 1 is.")] = 3.0,
    steps: Annotated[int, typer.Option(help="Steps of each job.")] = 24,
    stages: Annotated[list[int] | None, typer.Option(help="Stages, 1 or 2; may be given twice. Both by default.")] = None,
    path: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """Prints a table, and one JSON object per number of stages."""
    table = Table(title=f"seconds a step, worker 1 slowed {factor:g} times")
    for heading in ("stages", "undisturbed", "slowed, even plan", "slowed, work shifted", "ratio", "digest"):
        table.add_column(heading)
    found: list[dict[str, Any]] = []
    for count in stages or (1, 2):
        found.append(measured(steps, factor, count))
        seconds = (f"{found[-1][f'{name}_step_s']:.3f}" for name in ("calm", "even", "shifted"))
        table.add_row(str(count), *seconds, f"{found[-1]['ratio']:.2f}", "equal")
        print(json.dumps({name: value for name, value in found[-1].items() if name != "runs"}), flush=True)
    Console(stderr=True).print(table)
    write_json(path, found)


if __name__ == "__main__":
    app()
