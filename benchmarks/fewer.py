"""Measures tokens/s after a loss, relative to those before it times (n - 1)/n, where each worker has the same share of a processor.

    python benchmarks/fewer.py --json build/fewer.json

Without shares the workers that are left would get the dead worker's processor time, and lose nothing. So each is put into a control
group of its own, which may use the same part of a core: root and the `cpu` controller (version 1 or 2) are needed. The batch divides
evenly among all workers, and among all but one.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from report import write_json
from rich.console import Console
from rich.table import Table

import elastic
from elastic.chaos.faults import parse
from elastic.chaos.killer import Killer

sys.path.append(str(Path(__file__).resolve().parents[1]))

from examples import gpt

MICRO_BATCH, SEQ = 2, 128
PERIOD_US = 10_000
V1, V2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
SETTLING = 6
"""Steps after a change that are not counted: the first ones allocate memory."""

app = typer.Typer(add_completion=False)


class Shares:
    """Control groups that may each use the same part of a core."""

    def __init__(self, name: str, share: float) -> None:
        self._root = (V1 if V1.is_dir() else V2) / name
        self._share = share

    def __enter__(self) -> Shares:
        self._root.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        for group in [*self._root.glob("*/"), self._root]:
            group.rmdir()

    def enter(self, worker: int) -> None:
        """Puts this process into the group of this worker."""
        group = self._root / str(worker)
        group.mkdir()
        quota = round(PERIOD_US * self._share)
        if V1.is_dir():
            (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            (self._root / "cgroup.subtree_control").write_text("+cpu")
            (group / "cpu.max").write_text(f"{quota} {PERIOD_US}")
        (group / "cgroup.procs").write_text(str(os.getpid()))


def train(job: elastic.Job, options: dict[str, Any], name: str, share: float) -> dict[str, Any] | None:
    """Trains the example's GPT with a share of a core."""
    Shares(name, share).enter(job.worker)
    return gpt.train(job, options)


def measured(workers: int, stages: int, steps: int, share: float) -> dict[str, Any]:
    """Kills one worker in the middle of a job; returns the median tokens/s before and after, and their ratio to (n - 1)/n."""
    batch = math.lcm(workers, workers - 1) * MICRO_BATCH
    shape = {"layers": 8, "dim": 256, "heads": 8, "seq": SEQ, "dropout": 0.1, "clip": 1.0}
    options = {**shape, "batch": batch, "micro_batch": MICRO_BATCH, "steps": 2 * steps}
    name = f"elastic-bench-{os.getpid()}"
    given = {"workers": workers, "stages": stages, "args": [options, name, share], "rebalance": False, "respawn": False}
    with (
        tempfile.TemporaryDirectory(prefix="elastic-bench-") as directory,
        Shares(name, share),
        Killer(directory, [parse(f"{workers - 1}@{steps}")], 0),
    ):
        result = elastic.run(train, directory=directory, **given)
    if [incident["kind"] for incident in result.incidents] != ["death"]:
        raise SystemExit(f"the job had other incidents than the death: {result.incidents}")
    rates = result.value["tokens_per_second"]
    before, after = statistics.median(rates[SETTLING:steps]), statistics.median(rates[steps + SETTLING :])
    figures = {"workers": workers, "stages": stages, "batch": batch, "share": share, "before": before, "after": after}
    return {**figures, "ratio": after / before * workers / (workers - 1), "tokens_per_second": rates}


@app.command()
def main(
    workers: Annotated[int, typer.Option(min=2, help="Workers before the loss.")] = 4,
    stages: Annotated[int, typer.Option(min=1, help="Stages.")] = 1,
    steps: Annotated[int, typer.Option(min=SETTLING + 3, help="Steps before the loss, and after it.")] = 18,
    rounds: Annotated[int, typer.Option(min=1, help="Jobs.")] = 3,
    share: Annotated[float, typer.Option(help="Part of a core for each worker; by default 0.8 of all cores, evenly.")] = 0.0,
    path: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """Prints a table of the jobs."""
    if os.geteuid() != 0 or not os.access(V1 if V1.is_dir() else V2, os.W_OK):
        raise SystemExit("this needs root and a control-group file system that can be written to")
    part = share or round(0.8 * len(os.sched_getaffinity(0)) / workers, 2)
    table = Table(title=f"{workers} workers in {stages} stages, {part:g} of a core each; one is killed")
    for heading in ("tokens/s before", "after", "ratio to (n - 1)/n"):
        table.add_column(heading, justify="right")
    found = []
    for _ in range(rounds):
        found.append(measured(workers, stages, steps, part))
        table.add_row(f"{found[-1]['before']:,.0f}", f"{found[-1]['after']:,.0f}", f"{found[-1]['ratio']:.3f}")
    Console().print(table)
    write_json(path, found)


if __name__ == "__main__":
    app()
