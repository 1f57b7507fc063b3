"""Measures what the chaos harness costs a job: the same job alone and under the harness without faults, in pairs, one after the other.

    python benchmarks/chaos_overhead.py --pairs 5 --json build/chaos_overhead.json

Both are jobs of `elastic run` with the harness's own small GPT; the time is that from one step to another in the run directory's
`steps.jsonl`. Every second pair begins with the job under the harness. `--pause 0` trains without the pause behind each step: the shortest
steps, and so the largest overhead. The exit code is 1 if the median is 2 % or more.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from report import write_json
from rich.console import Console
from rich.table import Table

from elastic.chaos import trial
from elastic.chaos.evidence import Reference
from elastic.chaos.schedule import BUILT_IN, JobSpec, Schedule
from elastic.chaos.spawning import environment
from elastic.observe.json_lines import read_lines

_ALLOWED, _LIMIT_S = 0.02, 600.0
_NOTHING = Reference(losses=(), grad_norms=(), digests={})


def seconds_of(directory: Path, warm_up: int, steps: int) -> float:
    """Seconds from the step `warm_up` to the last one of `steps`."""
    at = {line["step"]: line["at"] for line in read_lines(directory / "steps.jsonl")}
    return at[steps - 1] - at[warm_up]


def alone(folder: Path, workers: int, steps: int, pause_s: float) -> Path:
    """Runs the job by itself; returns its run directory."""
    run = folder / "run"
    words = ["run", "--workers", str(workers), "--seed", "0", "--directory", str(run), BUILT_IN, str(steps), str(pause_s)]
    command = [sys.executable, "-m", "elastic.cli.main", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment(), timeout=_LIMIT_S)
    return run


def watched(folder: Path, workers: int, steps: int, pause_s: float) -> tuple[Path, float]:
    """Runs the job under the harness without faults; returns its run directory, and the processor seconds of the harness."""
    job = JobSpec(workers=workers, args=(steps, pause_s))
    record = trial.run(Schedule(job=job, injections=()), keep=folder, calm=_NOTHING)
    if bad := [reason for reason in record.reasons if reason.startswith("ended")]:
        raise SystemExit(f"the job under the harness: {bad[0]}")
    return folder / "disk" / "run0", record.harness_cpu_s


def pair(number: int, workers: int, warm_up: int, steps: int, pause_s: float) -> dict[str, Any]:
    """Runs both; returns the seconds of a step of each, and the processor seconds of the harness for a step."""
    found = dict[str, Any]()
    for name in ("alone", "watched") if number % 2 == 0 else ("watched", "alone"):
        with tempfile.TemporaryDirectory(prefix="elastic-bench-") as folder:
            if name == "alone":
                run = alone(Path(folder), workers, steps, pause_s)
            else:
                run, used = watched(Path(folder), workers, steps, pause_s)
                found["harness_cpu_s"] = used
            found[name] = seconds_of(run, warm_up, steps) / (steps - 1 - warm_up)
    return {"pair": number, **found, "overhead": found["watched"] / found["alone"] - 1}


def main(
    pairs: Annotated[int, typer.Option(min=1, help="How many pairs.")] = 5,
    steps: Annotated[int, typer.Option(min=20, help="Steps of each job.")] = 300,
    warm_up: Annotated[int, typer.Option(min=0, help="Steps before the time begins.")] = 20,
    workers: Annotated[int, typer.Option(min=1, help="Workers of the job.")] = 3,
    pause: Annotated[float, typer.Option(min=0.0, help="Seconds of pause behind each step.")] = 0.03,
    path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Runs all pairs, and prints a table."""
    if warm_up > steps - 10:
        raise typer.BadParameter(f"{steps} steps with {warm_up} of warm-up leave fewer than 10: give more steps")
    rows = []
    for number in range(pairs):
        rows.append(pair(number, workers, warm_up, steps, pause))
        print(json.dumps(rows[-1]), flush=True)
    median = statistics.median(row["overhead"] for row in rows)
    table = Table("pair", "step alone", "under the harness", "overhead")
    for row in rows:
        table.add_row(str(row["pair"]), f"{1000 * row['alone']:.2f} ms", f"{1000 * row['watched']:.2f} ms", f"{row['overhead']:+.2%}")
    Console().print(table)
    print(f"median overhead of {pairs} pairs: {median:+.2%}; asked: less than {_ALLOWED:.0%}")
    write_json(path, {"steps": steps, "workers": workers, "pause_s": pause, "pairs": rows, "median": median})
    raise typer.Exit(0 if median < _ALLOWED else 1)


if __name__ == "__main__":
    typer.run(main)
