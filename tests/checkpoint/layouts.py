"""Saves jobs on one layout, with checkpoints cut into slices, and resumes them on another layout: every combination.

    python -m tests.checkpoint.layouts

Writer and reader have 1 to 6 workers in 1 to 3 stages; the checkpoint has 1, 2 or 4 slices. The model has every kind of state that a
checkpoint must contain: tied, frozen and bfloat16 parameters, a buffer, two optimizer groups, a scheduler, and a vocabulary that slices
pad. The resumed job builds its model from another seed, so its state can only come from the checkpoint. A cell passes if the losses, norms
and rates of all steps, the parameters after each step, and everything saved at the end equal those of an uninterrupted run, bit for bit.
Exits with 0 only if every cell passes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import elastic
from elastic.checkpoint.convert.rules import Rules, parse_rules
from elastic.checkpoint.convert.run import Conversion, convert
from elastic.settings import best_isa, worker_environment
from tests.engine import harness, models

VOCABULARY, WIDTH, HEADS, KV_HEADS, HEAD, INNER, LENGTH = 50, 16, 8, 4, 2, 24, 6
STEPS, SAVED = 4, 2


class Tokens:
    """A map-style dataset of sentences."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        return (torch.arange(LENGTH + 1) * 7 + index * 3) % VOCABULARY


class Embedding(nn.Module):
    """Tokens and places, of which the latter are frozen, times a buffer."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.1, requires_grad=False)
        self.register_buffer("scale", 1 + 0.1 * torch.rand(WIDTH))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return (functional.embedding(batch[:, :-1], self.weight) + self.position) * self.scale


class Block(nn.Module):
    """Attention with fewer key and value heads, its three matrices fused, and a gated layer with two fused; in `dtype` within."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD)
        self.out = nn.Linear(HEADS * HEAD, WIDTH)
        self.up = nn.Linear(WIDTH, 2 * INNER, bias=False)
        self.down = nn.Linear(INNER, WIDTH, bias=False)
        self.dropout = nn.Dropout(0.1)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inside = x.to(self.out.weight.dtype)
        query, key, value = self.qkv(inside).split([HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD], -1)
        query = query.unflatten(-1, (KV_HEADS, HEADS // KV_HEADS, HEAD))
        key, value = (each.unflatten(-1, (KV_HEADS, HEAD)) for each in (key, value))
        weights = torch.einsum("btkhd,bskd->bkhts", query, key).softmax(-1)
        inside = inside + self.dropout(self.out(torch.einsum("bkhts,bskd->btkhd", weights, value).flatten(2)))
        gate, up = self.up(inside).chunk(2, -1)
        return (inside + self.down(functional.silu(gate) * up)).to(x.dtype)


class Head(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(self.norm(x), self.weight)


def model() -> list[nn.Module]:
    shared = nn.Parameter(torch.randn(VOCABULARY, WIDTH) * 0.3)
    return [Embedding(shared), Block(torch.float32), Block(torch.bfloat16), Head(shared)]


def next_token(output: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(output.flatten(0, 1), batch[:, 1:].flatten())


RULES: dict[int, Rules] = {
    1: Rules(),
    2: parse_rules(
        {
            "slice": [
                {"exact": "0.weight", "preset": "vocab", "padded": 64},
                {"exact": "0.scale", "widths": [[11, 5]]},
                {"regex": r"\d\.qkv\.(weight|bias)", "parts": [16, 8, 8], "unit": 2, "widths": [[10, 6], [2, 6], [8, 0]]},
                {"regex": r"\d\.out\.weight", "dim": 1, "widths": [[10, 6]]},
                {"regex": r"\d\.up\.weight", "preset": "gate_up", "widths": [[23, 1], [7, 17]]},
                {"regex": r"\d\.down\.weight", "dim": 1},
            ]
        }
    ),
    4: parse_rules(
        {
            "slice": [
                {"exact": "0.weight", "preset": "vocab", "multiple": 5},
                {"exact": "0.position", "dim": 1},
                {"regex": r"\d\.qkv\..*", "preset": "qkv", "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD},
                {"regex": r"\d\.out\.weight", "dim": 1, "unit": HEAD},
                {"regex": r"\d\.up\.weight", "preset": "gate_up"},
                {"regex": r"\d\.down\.weight", "dim": 1},
            ]
        }
    ),
}


def decaying(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)


def train(job: Any, folder: str, steps: int, seed: int, every: int | None = None) -> dict[str, Any]:
    """Trains; returns what this worker was given in each step, and the leader's digests of the parameters after each."""
    torch.manual_seed(seed)
    options = {"batch_size": 12, "micro_batch_size": 2, "seed": 11, "clip_norm": 0.5, "scheduler": decaying}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*began with other initial parameters")  # on purpose
        trainer = elastic.Trainer(model(), next_token, models.two_groups, Tokens(), checkpoint=folder, every=every, **options)
    lines, digests = [], []
    for report in trainer.run(steps):
        lines.append((report.step, report.loss, report.grad_norm, report.lr))
        digests.append(trainer.digest())
    return {"lines": lines, "digests": digests}


@dataclass(frozen=True, slots=True)
class Layout:
    """A number of workers and of stages."""

    workers: int
    stages: int

    def __str__(self) -> str:
        return f"{self.workers}/{self.stages}"


LAYOUTS = tuple(Layout(workers, stages) for workers in range(1, 7) for stages in range(1, min(workers, 3) + 1))
SLICES = tuple(RULES)


def saved(folder: Path, step: int) -> dict[str, str]:
    """Returns digests of all files of values that were saved after that many steps."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / f"step-{step:08d}").glob("*.safetensors")}


@dataclass(frozen=True, slots=True)
class Whole:
    """The run that was never interrupted, on one worker: of each step its line and digest, and the files that it saved at its end."""

    lines: Sequence[Any]
    digests: Sequence[str]
    files: dict[str, str]


def whole(folder: Path, steps: int) -> Whole:
    (found,) = harness.run(train, workers=1, args=(str(folder), steps, 5))
    return Whole(found["lines"], found["digests"], saved(folder, steps))


def faults(layout: Layout, folder: Path, steps: int, seed: int, expected: Whole, first: int) -> list[str]:
    """Runs a job on `layout` from step `first` to the end of `steps` steps; returns its differences from the whole run."""
    results = harness.run(train, workers=layout.workers, stages=layout.stages, args=(str(folder), steps, seed))
    found = []
    if any(result["lines"] != list(expected.lines[first:steps]) for result in results):
        found.append("losses")
    if results[0]["digests"] != list(expected.digests[first:steps]):
        found.append("parameters")
    if steps == len(expected.lines) and saved(folder, steps) != expected.files:
        found.append("what was saved")
    return found


def sliced(source: Path, target: Path, slices: int) -> Path:
    """Converts what a job saved."""
    convert(Conversion(source=source, target=target, to="elastic", rules=RULES[slices], tensor_parallel=slices))
    return target


def cells(work: Path, layouts: Sequence[Layout]) -> Iterator[tuple[Layout, int, Layout, list[str]]]:
    """Writer, slices, reader, and what differs."""
    expected = whole(work / "whole", STEPS)
    for writer in layouts:
        wrote = work / f"written-{writer.workers}-{writer.stages}"
        wrong = [f"{fault} when it was written" for fault in faults(writer, wrote, SAVED, 5, expected, 0)]
        for slices in SLICES:
            kept = sliced(wrote, work / f"{wrote.name}-by-{slices}", slices)
            for reader in layouts:
                copy = work / "copy"
                shutil.copytree(kept, copy)
                yield writer, slices, reader, wrong + faults(reader, copy, STEPS, 9, expected, SAVED)
                shutil.rmtree(copy)


def main() -> int:
    """Prints the table."""
    began, bad = time.monotonic(), []
    print(
        f"writer x slices -> reader: = bit for bit, X not; a layout is workers/stages\n{'':<12}"
        + "".join(f"{reader!s:>5}" for reader in LAYOUTS)
    )
    with tempfile.TemporaryDirectory(prefix="layouts-") as directory:
        for writer, slices, reader, wrong in cells(Path(directory), LAYOUTS):
            if reader == LAYOUTS[0]:
                print(f"{writer!s:<6}{f'x {slices}':<6}", end="")
            print(f"{'X' if wrong else '=':>5}", end="\n" if reader == LAYOUTS[-1] else "", flush=True)
            bad += [f"{writer} x {slices} -> {reader}: {', '.join(wrong)}"] if wrong else []
    count = len(LAYOUTS) ** 2 * len(SLICES)
    print("\n".join(bad[:40]) or f"all {count} cells hold ({time.monotonic() - began:.0f} s)")
    return 1 if bad else 0


if __name__ == "__main__":
    numeric = worker_environment(1, best_isa())
    if any(os.environ.get(name) != value for name, value in numeric.items()):  # bits depend on it, and only a new process can set it
        sys.exit(subprocess.run([sys.executable, "-m", "tests.checkpoint.layouts"], env={**os.environ, **numeric}, check=False).returncode)
    sys.exit(main())
