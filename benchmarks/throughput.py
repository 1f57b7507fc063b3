"""Compares our tokens per second with plain torch on Gloo, side by side: the same model, data, optimizer, threads and environment.

    python benchmarks/throughput.py --json build/throughput.json

1. One stage, 4 workers, against DistributedDataParallel. Both sides run a worker's whole share of the batch as one micro-batch and, in
   separate pairs if this differs, smaller micro-batches (DDP's under `no_sync`). The peer's best variant is reported.
2. The same as a plain loop: the model, the optimizer and the text are given to `job.prepare`, against the same peer.
3. Two stages, 2 workers, against torch.distributed.pipelining's Schedule1F1B with our stage cut and micro-batches.

Sides alternate, each run in new processes. A run's figure is the median time of its steps; ratios are computed within pairs of runs.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from measure import SEQ, BenchmarkError, Measurement, Task, check_same_work, run_ours, run_peer, startup_of_ddp, startup_of_ours
from report import write_json
from rich.console import Console
from rich.table import Table

from elastic.errors import ElasticError
from elastic.settings import best_isa

BenchmarkKind = Literal["ddp", "plain", "pipeline"]
_SHAPES: dict[BenchmarkKind, tuple[int, int]] = {"ddp": (4, 1), "plain": (4, 1), "pipeline": (2, 2)}  # workers, stages
_NAMES: dict[BenchmarkKind, str] = {
    "ddp": "DistributedDataParallel",
    "plain": "DistributedDataParallel, of a plain loop",
    "pipeline": "pipelining.Schedule1F1B",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedRun:
    """One run of ours, and one of the peer right after it. `load` is the machine's load average before both."""

    ours: Measurement
    peer: Measurement
    load: float

    @property
    def ratio(self) -> float:
        """The ratio of our tokens per second to the peer's."""
        return self.peer.median_s / self.ours.median_s

    def to_json(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "load_average_before": self.load, "ours": self.ours.to_json(), "peer": self.peer.to_json()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One peer at one batch size: a pair per round for each variant of the peer."""

    kind: BenchmarkKind
    task: Task
    pairs: dict[str, list[PairedRun]]

    @property
    def variant(self) -> str:
        """The peer's fastest variant, by the ratio to our adjacent runs: noise that lasts minutes affects both runs of a pair."""
        return min(self.pairs, key=lambda variant: statistics.median(pair.ratio for pair in self.pairs[variant]))

    def figures(self, variant: str) -> dict[str, Any]:
        """Returns spreads over the rounds: tokens per second of both sides, and their ratio."""
        tokens, pairs = self.task.batch * SEQ, self.pairs[variant]
        return {
            "ours_tokens_per_second": spread([tokens / pair.ours.median_s for pair in pairs]),
            "peer_tokens_per_second": spread([tokens / pair.peer.median_s for pair in pairs]),
            "ratio": spread([pair.ratio for pair in pairs]),
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "peer": _NAMES[self.kind],
            "variant": self.variant,
            "workers": self.task.workers,
            "stages": self.task.stages,
            "tokens_per_step": self.task.batch * SEQ,
            "batch": self.task.batch,
            "micro_batch": self.task.micro_batch,
            **self.figures(self.variant),
            "variants": {
                variant: self.figures(variant) | {"rounds": [pair.to_json() for pair in pairs]} for variant, pairs in self.pairs.items()
            },
        }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def task_for(kind: BenchmarkKind, tokens: int, warm_up: int, steps: int) -> Task:
    """Returns a task with micro-batches of 4 samples, or fewer if the batch is too small for four such micro-batches."""
    workers, stages = _SHAPES[kind]
    batch = tokens // SEQ
    return Task(workers=workers, stages=stages, batch=batch, micro_batch=min(4, batch // 4), warm_up=warm_up, steps=steps)


def variants_of(kind: BenchmarkKind, task: Task) -> dict[str, int]:
    """Returns the peer's variants: a name, and the samples it runs at a time."""
    if kind == "pipeline":
        return {"micro-batches": task.micro_batch}
    share = task.batch // task.workers
    tried = {"whole share": share}
    if share > task.micro_batch and share % task.micro_batch == 0:
        tried["micro-batches, no_sync"] = task.micro_batch
    return tried


def compare(kind: BenchmarkKind, task: Task, rounds: int, bucket_mb: float | None, console: Console) -> Comparison:
    """Runs ours, peer, ours, peer and so on. Raises BenchmarkError if a peer fails, or its losses differ from ours."""
    variants = variants_of(kind, task)
    pairs: dict[str, list[PairedRun]] = {variant: [] for variant in variants}
    for number in range(rounds):
        for variant, micro_batch in variants.items():
            load = os.getloadavg()[0]
            same = replace(task, micro_batch=micro_batch)  # the same kernels at the same shapes on both sides
            ours = run_ours(same, "train_plain" if kind == "plain" else "train")
            peer = run_peer(task, "ddp" if kind == "plain" else kind, ours.cut, micro_batch=micro_batch, bucket_mb=bucket_mb)
            check_same_work(ours, peer)
            pair = PairedRun(ours=ours, peer=peer, load=load)
            pairs[variant].append(pair)
            where = f"{_NAMES[kind]}, {variant}, {task.batch * SEQ} tokens, round {number + 1} of {rounds}"
            console.print(f"{where}: ratio {pair.ratio:.3f}, at load {load:.1f}", soft_wrap=True)
    return Comparison(kind=kind, task=task, pairs=pairs)


def start_up(rounds: int, console: Console) -> dict[str, Any]:
    """Measures the seconds to the first step of 4 workers in one stage."""
    task = task_for("ddp", 1024, 1, 1)
    ours, peer = [], []
    for number in range(rounds):
        ours.append(startup_of_ours(task))
        peer.append(startup_of_ddp(task))
        console.print(f"start-up, round {number + 1} of {rounds}: ours {ours[-1]:.2f} s, DDP {peer[-1]:.2f} s")
    return {"workers": task.workers, "ours_s": spread(ours), "ddp_s": spread(peer), "rounds": list(zip(ours, peer, strict=True))}


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "isa": best_isa(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "load_average": os.getloadavg()[0],
    }


def show(report: dict[str, Any], console: Console) -> None:
    """Prints the table."""
    rounds = report["options"]["rounds"]
    table = Table(title=f"tokens/s of ours and the peer, and their ratio: median of {rounds} pairs, least to most")
    for heading in ("case", "ours", "peer", "ours / peer"):
        table.add_column(heading, no_wrap=heading != "case")
    for found in report["comparisons"]:
        shape = f"{found['tokens_per_step']} tokens a step, workers {found['workers']}, stages {found['stages']}"
        case = f"{shape}\n{found['peer']}, {found['variant']}"
        rates = [_cell(found[side], ".0f") for side in ("ours_tokens_per_second", "peer_tokens_per_second")]
        table.add_row(case, *rates, _cell(found["ratio"], ".3f"))
    console.print(table)
    started = report["start_up"]
    if started is not None:
        ours, ddp = (_cell(started[side], ".2f").replace("\n", ", ") for side in ("ours_s", "ddp_s"))
        console.print(f"seconds from the launch to the first step of {started['workers']} workers:\n  ours {ours}\n  DDP {ddp}")


def _cell(values: dict[str, float], form: str) -> str:
    return f"{values['median']:{form}}\n{values['min']:{form}} to {values['max']:{form}}"


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of runs per comparison.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of a run.")] = 10,
    warm_up: Annotated[int, typer.Option(min=1, help="Untimed steps before them.")] = 3,
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens a step, a multiple of 512; 4096 and 1024 by default.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help="`ddp`, `plain` (a plain loop against DDP) or `pipeline`; all by default.")] = None,
    startup: Annotated[bool, typer.Option(help="Measure the time to the first step too.")] = True,
    bucket_mb: Annotated[float | None, typer.Option(help="DDP's bucket_cap_mb; torch's default by default.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file instead of stdout.")] = None,
) -> None:
    """Compares our tokens per second with DistributedDataParallel and torch.distributed.pipelining on this machine."""
    sizes = tokens or [4096, 1024]
    if bad := [size for size in sizes if size < 512 or size % 512]:
        raise typer.BadParameter(f"--tokens {bad[0]} is not a multiple of 512, four samples of {SEQ} tokens")
    if peer and (strange := set(peer).difference(_SHAPES)):
        raise typer.BadParameter(f"--peer {strange.pop()}: use ddp, plain or pipeline")
    kinds: list[BenchmarkKind] = [kind for kind in _SHAPES if peer is None or kind in peer]
    progress = Console(stderr=True, highlight=False)
    report: dict[str, Any] = {
        "machine": machine(),
        "options": {"rounds": rounds, "steps": steps, "warm_up": warm_up, "bucket_mb": bucket_mb},
    }
    try:
        report["comparisons"] = [
            compare(kind, task_for(kind, size, warm_up, steps), rounds, bucket_mb, progress).to_json() for kind in kinds for size in sizes
        ]
        report["start_up"] = start_up(rounds, progress) if startup else None
    except (BenchmarkError, ElasticError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    show(report, Console(highlight=False))
    if json_file is None:
        print(json.dumps(report))
    write_json(json_file, report)


if __name__ == "__main__":
    typer.run(main)
