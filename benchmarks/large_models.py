"""Measures how much memory workers take of a model that is given by a function, and of the same model built by every worker.

    python benchmarks/large_models.py --json build/large_models.json

A worker's peak is that of its own memory, the segment included, without what it took before it built the model: up to the first view
(founding), and up to the end of the training. The bound of the first one is 1.15 times the worker's share and one layer. The share is what
it holds when a view begins: its layers' parameters, and as much for sums of their gradients. The layer is its parameters, their gradients
and its activations, which worker 0 measures. `process` is the whole process's peak up to the first view, with libraries and interpreter.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from report import write_json
from rich.console import Console
from rich.table import Table
from torch import nn

import elastic
from elastic.plan.memory import need, readable
from elastic.plan.workload import Workload
from elastic.plan.workload import costs as layer_costs

SLACK = 1.15
SAMPLES = 2


class Block(nn.Module):
    """A norm and a feed-forward network of 8 dim^2 parameters."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def build(layers: int, dim: int) -> list[nn.Module]:
    """Builds the model."""
    return [Block(dim) for _ in range(layers)]


def batch(step: int, micro_batch: int, dim: int) -> tuple[torch.Tensor]:
    """Returns a micro-batch."""
    return (torch.randn(SAMPLES, dim, generator=torch.Generator().manual_seed(97 * step + micro_batch)),)


def _status() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("Vm", "Rss"))}


class Peak:
    """The most memory of this process, without files, above what it had when this was made."""

    def __init__(self) -> None:
        now = _status()
        self._before = now["RssAnon"] + now["RssShmem"]
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here

    @property
    def bytes(self) -> int:
        """Bytes until now. Pages of files (libraries) that came meanwhile are not counted."""
        now = _status()
        return now["VmHWM"] - now["RssFile"] - self._before


def train(job: elastic.Job, layers: int, dim: int, steps: int, deferred: bool) -> list[dict[str, Any]] | None:
    """Runs on every worker; returns a row for each."""
    torch.optim.SGD([nn.Parameter(torch.ones(1))])  # the first optimizer of a process imports a compiler, 70 MB
    started, peak = time.monotonic(), Peak()
    torch.manual_seed(0)
    trainer = elastic.Trainer(
        (lambda: build(layers, dim)) if deferred else build(layers, dim),
        lambda output, _: output.square().mean(),
        lambda parameters: torch.optim.AdamW(parameters, fused=True),
        lambda step, micro_batch: batch(step, micro_batch, dim),
        batch_size=4 * SAMPLES,
        micro_batch_size=SAMPLES,
    )
    founding, process, founded_s = peak.bytes, _status()["VmHWM"], time.monotonic() - started
    for _ in trainer.run(steps):
        pass
    row = {"worker": job.worker, "founding": founding, "process": process, "founded_s": founded_s, "training": peak.bytes}
    (Path(job.directory) / f"peak-{job.worker}.json").write_text(json.dumps(row))
    found = trainer.statistics()
    return found and [{name: each[name] for name in ("worker", "layers", "parameter_bytes")} for each in found]


def bounds(layers: int, own: int, dim: int, workers: int) -> tuple[float, float]:
    """Returns the bounds in bytes of a worker's peak with `own` of the layers: when founding, and (the planner's) when training."""
    parameters = 8 * dim * dim + 7 * dim
    costs = [[0.0, 0.0, parameters, 4.0 * SAMPLES * 12 * dim, 4 * SAMPLES * dim, 4]] * layers
    workload = Workload(layers=layer_costs(costs), micro_batches=4, grains=4, state_bytes=8.0)
    training = need(workload, range(own), 1, workers, workers, 4, replicas=0, outlive=True)
    layer = 2 * 4 * parameters + workload.layers[0].activation_bytes
    return SLACK * (2 * own * 4 * parameters + layer), training.total


def measured(workers: int, layers: int, dim: int, steps: int, *, deferred: bool) -> list[dict[str, Any]]:
    """Runs one job and returns a row for each worker."""
    with tempfile.TemporaryDirectory(prefix="elastic-large-") as directory:
        result = elastic.run(
            train, workers=workers, stages=workers, args=(layers, dim, steps, deferred), directory=directory, progress=False
        )
        peaks = {each["worker"]: each for each in map(json.loads, (path.read_text() for path in Path(directory).glob("peak-*.json")))}
    return [{**each, **peaks[each["worker"]]} for each in result.value or []]


def main(
    workers: Annotated[int, typer.Option(help="Worker processes, a stage each.")] = 4,
    layers: Annotated[int, typer.Option(help="Layers; 48 with --dim 1024 are 403 million parameters.")] = 48,
    dim: Annotated[int, typer.Option(help="Width of the model.")] = 1024,
    steps: Annotated[int, typer.Option(help="Steps to take.")] = 2,
    eager: Annotated[bool, typer.Option(help="Also let every worker build the whole model.")] = False,
    report: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Prints the peaks and their bounds; exits with 1 if a founder of the deferred model is above its bound."""
    table = Table(title=f"{layers} layers, {readable(layers * 4 * (8 * dim * dim + 7 * dim))} of parameters, AdamW, {workers} workers")
    for column in (
        "model",
        "worker",
        "layers",
        "own parameters",
        "founding",
        "bound",
        "process",
        "training",
        "planner's bound",
        "founded after",
    ):
        table.add_column(column, justify="right")
    found: dict[str, Any] = {}
    above = False
    for kind in ("deferred", "eager") if eager else ("deferred",):
        found[kind] = measured(workers, layers, dim, steps, deferred=kind == "deferred")
        for row in found[kind]:
            row["founding_bound"], row["training_bound"] = bounds(layers, len(row["layers"]), dim, workers)
            above |= kind == "deferred" and row["founding"] > row["founding_bound"]
            sizes = [
                readable(row[name]) for name in ("parameter_bytes", "founding", "founding_bound", "process", "training", "training_bound")
            ]
            table.add_row(kind, str(row["worker"]), str(len(row["layers"])), *sizes, f"{row['founded_s']:.1f} s")
    Console(width=140).print(table)
    if report is not None:
        write_json(report, found)
    if above:
        print("error: a founder took more memory than its bound", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
