"""Measures what a DataLoader's processes save where samples take long to load.

    python benchmarks/loading.py --json build/loading.json
    python benchmarks/loading.py --kind computes --ms 1        # samples that take a processor: with 2 cores there is little to save

A sample takes some milliseconds: it waits, as for a disk or a network, or computes. The same small model, samples and batches, with and
without processes: a job of ours, and torch's own loop in one process. Modes alternate; of each run the median of its steps counts.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from measure import peer_environment
from report import write_json
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import elastic

Kind = Literal["waits", "computes"]
BATCH, MICRO_BATCH, SAMPLES = 64, 8, 1 << 14
app = typer.Typer(add_completion=False)


class Slow(Dataset[tuple[torch.Tensor, int]]):
    """Samples that take `ms` milliseconds each."""

    def __init__(self, kind: Kind, ms: float) -> None:
        self._kind, self._seconds = kind, ms / 1000

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self._kind == "waits":
            time.sleep(self._seconds)
        else:
            until = time.thread_time() + self._seconds
            while time.thread_time() < until:
                pass
        return torch.full((256,), index / SAMPLES), index % 10


def made(kind: Kind, ms: float, processes: int) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
    """Returns model, optimizer and loader. A step of the model takes some 20 ms."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    loader = DataLoader(Slow(kind, ms), batch_size=BATCH, shuffle=True, num_workers=processes)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3), loader


def ours(job: elastic.Job, kind: Kind, ms: float, processes: int, steps: int) -> dict[str, Any] | None:
    """Returns when steps were committed, and the digest."""
    model, optimizer, loader = job.prepare(*made(kind, ms, processes), micro_batch_size=MICRO_BATCH, steps=steps)
    stamps = []
    for x, y in loader:
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if loader.report is not None:
            stamps.append(time.monotonic())
    digest = loader.digest()
    return {"stamps": stamps, "digest": digest} if job.leader else None


def torchs(kind: Kind, ms: float, processes: int, steps: int) -> list[float]:
    """Returns when steps of an ordinary loop had ended. A step of it has the same micro-batches."""
    torch.set_num_threads(1)
    model, optimizer, loader = made(kind, ms, processes)
    stamps = []
    for number, (x, y) in enumerate(loader):
        if number == steps:
            break
        for part, labels in zip(x.split(MICRO_BATCH), y.split(MICRO_BATCH), strict=True):
            (functional.cross_entropy(model(part), labels) / (BATCH // MICRO_BATCH)).backward()
        optimizer.step()
        optimizer.zero_grad()
        stamps.append(time.monotonic())
    return stamps


def median_step(stamps: list[float], warm_up: int) -> float:
    """Returns the median seconds of a step."""
    return statistics.median(after - before for before, after in zip(stamps[warm_up - 1 :], stamps[warm_up:], strict=False))


@app.command()
def main(
    kind: Annotated[str, typer.Option(help="`waits` or `computes`.")] = "waits",
    ms: Annotated[float, typer.Option(help="Milliseconds of a sample.")] = 2.0,
    processes: Annotated[int, typer.Option(min=1, help="num_workers, of each worker.")] = 2,
    workers: Annotated[int, typer.Option(min=1, help="Workers of our job.")] = 2,
    steps: Annotated[int, typer.Option(min=20, max=SAMPLES // BATCH, help="Steps of a run.")] = 150,
    warm_up: Annotated[int, typer.Option(min=1, help="Steps of it that do not count: processes start in them.")] = 80,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each mode.")] = 3,
    path: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """Prints seconds a step, with and without processes."""
    if kind not in ("waits", "computes"):
        raise typer.BadParameter(f"--kind {kind}: use waits or computes")
    if warm_up > steps - 2:
        raise typer.BadParameter(f"--warm-up {warm_up}: two steps at least must count, of {steps}")
    digests: set[str] = set()

    def of_ours(count: int) -> list[float]:
        done = elastic.run(ours, workers=workers, args=[kind, ms, count, steps], progress=False).value
        digests.add(done["digest"])
        return done["stamps"]

    def of_torch(count: int) -> list[float]:
        code = f"import json, loading; print(json.dumps(loading.torchs({kind!r}, {ms}, {count}, {steps})))"
        command, environment = [sys.executable, "-c", code], {**peer_environment(), "PYTHONPATH": str(Path(__file__).parent)}
        return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    modes: dict[str, tuple[Callable[[int], list[float]], int]] = {}
    for name, run in ((f"elastic, {workers} workers", of_ours), ("torch, one process", of_torch)):
        modes |= {f"{name}, num_workers={count}": (run, count) for count in (0, processes)}
    found: dict[str, list[float]] = {name: [] for name in modes}
    for _ in range(rounds):
        for name, (run, count) in modes.items():
            found[name].append(median_step(run(count), warm_up))
    if len(digests) != 1:
        raise SystemExit(f"processes change the parameters: {digests}")
    table = Table("", "seconds a step", "least", "most", title=f"a sample {kind} for {ms:g} ms, {BATCH} samples a step")
    for name, values in found.items():
        table.add_row(name, *(f"{each:.4f}" for each in (statistics.median(values), min(values), max(values))))
    Console().print(table)
    write_json(path, {"kind": kind, "ms": ms, "workers": workers, "load": os.getloadavg()[0], "seconds": found})


if __name__ == "__main__":
    app()
