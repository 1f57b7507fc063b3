"""Trains a byte-level GPT in several worker processes, on the source code of Python's standard library or on a file of yours.

    python examples/gpt.py --workers 4 --stages 2 --steps 40
    python examples/gpt.py --workers 4 --stages 2 --steps 40 --kill 1@8 --kill 0@22:reduce
    python examples/gpt.py --workers 4 --stages 2 --steps 20 --checkpoint runs/a --checkpoint-every 5
    python examples/gpt.py --workers 3 --stages 3 --steps 40 --checkpoint runs/a

The parameters and every loss are bit for bit the same for any number of workers and stages, and after any kill.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import torch
import typer
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

import elastic
from elastic.chaos.faults import parse
from elastic.chaos.killer import Killer, Missed
from elastic.observe.progress import ProgressLine

VOCABULARY = 256
_OF_THE_JOB = ("workers", "stages", "kill", "respawn", "min_workers", "etcd", "device", "report")
_KILL = "PLACE@STEP[:PHASE]: SIGKILL for the worker at that place of the current view, in that step and phase. Repeatable."

_INIT = (
    "eager: every worker builds the whole model; deferred: a worker gives memory to its own layers only, with initial values that follow "
    "from seed and name. The two have different initial values."
)


class Embedding(nn.Module):
    """Tokens (samples, seq) to vectors (samples, seq, dim)."""

    def __init__(self, dim: int, seq: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, dim)
        self.position = nn.Parameter(torch.zeros(seq, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.token(tokens) + self.position[: tokens.shape[1]])


class Block(nn.Module):
    """A pre-norm transformer block, causal attention and a feed-forward network: (samples, seq, dim) to the same shape."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        self.feed_norm = nn.LayerNorm(dim)
        self.feed = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        samples, seq, dim = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(samples, seq, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        rate = self.rate if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, dropout_p=rate, is_causal=True)
        x = x + self.dropout(self.project(mixed.transpose(1, 2).reshape(samples, seq, dim)))
        return x + self.dropout(self.feed(self.feed_norm(x)))


class Head(nn.Module):
    """Vectors (samples, seq, dim) to logits (samples, seq, vocabulary)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, VOCABULARY, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.norm(x))


def build_gpt(layers: int, dim: int, heads: int, seq: int, dropout: float, *, tied: bool = False) -> nn.Sequential:
    """Builds `layers` blocks between an embedding and a head, as `layers + 2` layers to split into stages."""
    embedding, head = Embedding(dim, seq, dropout), Head(dim)
    model = nn.Sequential(embedding, *(Block(dim, heads, dropout) for _ in range(layers)), head)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    if tied:
        head.output.weight = embedding.token.weight
    return model


class Text(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Windows of `seq` bytes, and the bytes that follow each."""

    def __init__(self, text: bytes, seq: int) -> None:
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.seq = seq

    def __len__(self) -> int:
        return (len(self.bytes) - 1) // self.seq

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        window = self.bytes[index * self.seq : (index + 1) * self.seq + 1].long()
        return window[:-1], window[1:]


def read_text(path: str | None) -> bytes:
    """Returns a file's bytes, or those of all top-level modules of the standard library in name order."""
    if path is not None:
        return Path(path).read_bytes()
    return b"\n".join(source.read_bytes() for source in sorted(Path(os.__file__).parent.glob("*.py")))


def cross_entropy(logits: torch.Tensor, micro_batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The loss: the mean over the micro-batch's tokens."""
    return functional.cross_entropy(logits.flatten(0, 1), micro_batch[1].flatten())


def complete(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options with the command line's defaults for those that are left out. Raises ValueError for unknown names."""
    known = {name: each.default for name, each in inspect.signature(main).parameters.items() if name not in _OF_THE_JOB}
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"unknown options {unknown}; there are {sorted(known)}")
    return {**known, **options}


def train(job: elastic.Job, options: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any] | None:
    """Runs on every worker; the leader's return value is the job's. `options` are those of the command line, without those of the job."""
    options = complete(options)
    torch.manual_seed(options["seed"])
    sizes = [options[name] for name in ("layers", "dim", "heads", "seq", "dropout")]
    build = partial(build_gpt, *sizes, tied=options["tie"])
    trainer = elastic.Trainer(
        build if options["init"] == "deferred" else build(),
        cross_entropy,
        lambda parameters: torch.optim.AdamW(parameters, lr=options["lr"], fused=True),
        Text(read_text(options["data"]), options["seq"]),
        batch_size=options["batch"],
        micro_batch_size=options["micro_batch"],
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10)),
        clip_norm=options["clip"],
        seed=options["seed"],
        autocast=torch.bfloat16 if options["bf16"] else None,
        checkpoint_activations=options["recompute"],
        checkpoint=options["checkpoint"],
        every=options["checkpoint_every"],
        keep=options["keep"],
    )
    progress = ProgressLine(options["steps"])
    with StepLog(Path(job.directory), job.worker) as log:
        for report in trainer.run(options["steps"]):
            progress.show(report)
            log.add(report)
    digest, workers = trainer.digest(), trainer.statistics()
    if not trainer.leader:
        return None
    steps = read_steps(Path(job.directory), resumed=options["checkpoint"] is not None)
    return {
        "first_step": steps[0]["step"] if steps else trainer.step,
        "steps": len(steps),
        "losses": [step["loss"] for step in steps],
        "grad_norms": [step["grad_norm"] for step in steps],
        "tokens_per_second": [step["tokens_per_second"] for step in steps],
        "digest": digest,
        "layouts": list(dict.fromkeys(step["layout"] for step in steps)),
        "workers": workers,
        "options": options,
    }


class StepLog:
    """Logs this worker's report of each step to a file that outlives it: the last leader may have joined after the start."""

    def __init__(self, directory: Path, worker: int) -> None:
        self._file = (directory / f"steps-{worker}.jsonl").open("a", buffering=1)

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, report: elastic.Report) -> None:
        self._file.write(json.dumps(dataclasses.asdict(report)) + "\n")


def read_steps(*directories: Path, resumed: bool = False) -> list[dict[str, Any]]:
    """Returns every step once, as its leader reported it, from the run directories of all hosts.

    Raises RuntimeError if workers disagree, if a worker reported a step twice, or if steps are missing.
    The first is step 0, unless the job `resumed` at another one.
    """
    steps: dict[int, dict[str, Any]] = {}
    for path in sorted(path for directory in directories for path in directory.glob("steps-*.jsonl")):
        whole = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if len({step["step"] for step in whole}) < len(whole):
            raise RuntimeError(f"a worker got the report of a step twice: see {path}")
        for step in whole:
            known = steps.setdefault(step["step"], step)
            if (known["loss"], known["grad_norm"]) != (step["loss"], step["grad_norm"]):
                raise RuntimeError(f"workers disagree on step {step['step']}: {known} and {step}")
            if step["leader"]:
                steps[step["step"]] = step
    first = min(steps, default=0) if resumed else 0
    if sorted(steps) != list(range(first, first + len(steps))):
        raise RuntimeError(f"steps are missing after step {first}: there are {sorted(steps)}")
    return [steps[step] for step in sorted(steps)]


def main(
    workers: Annotated[int, typer.Option(help="Worker processes.")] = 4,
    stages: Annotated[int | None, typer.Option(help="Pipeline stages; 0 lets the planner choose.")] = 2,
    steps: Annotated[int, typer.Option(help="Steps to take.")] = 40,
    layers: Annotated[int, typer.Option(help="Transformer blocks.")] = 8,
    dim: Annotated[int, typer.Option(help="Width of the model.")] = 256,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 8,
    seq: Annotated[int, typer.Option(help="Tokens a sample.")] = 128,
    batch: Annotated[int, typer.Option(help="Samples a step.")] = 32,
    micro_batch: Annotated[int, typer.Option(help="Samples a micro-batch.")] = 4,
    dropout: Annotated[float, typer.Option(help="Dropout rate.")] = 0.0,
    lr: Annotated[float, typer.Option(help="Learning rate, after ten steps of warm-up.")] = 1e-3,
    clip: Annotated[float | None, typer.Option(help="Largest gradient norm; none by default.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, data order and dropout.")] = 0,
    data: Annotated[str | None, typer.Option(help="A file to train on, instead of the standard library.")] = None,
    init: Annotated[str, typer.Option(help=_INIT)] = "eager",
    tie: Annotated[bool, typer.Option("--tie", help="Tie the head's weight to the embedding's.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="bf16 autocast with float32 parameters.")] = False,
    recompute: Annotated[bool, typer.Option("--recompute", help="Activation checkpointing.")] = False,
    checkpoint: Annotated[str | None, typer.Option(help="Directory or URL to save into, and to resume from.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Save every so many steps; the last step is always saved.")] = None,
    keep: Annotated[int | None, typer.Option(min=1, help="How many of the newest checkpoints to keep; all by default.")] = None,
    kill: Annotated[list[str] | None, typer.Option(help=_KILL)] = None,
    respawn: Annotated[bool, typer.Option(help="Start a new worker for each that dies.")] = True,
    min_workers: Annotated[int | None, typer.Option(help="How many workers the job may shrink to; with fewer it pauses.")] = None,
    etcd: Annotated[str | None, typer.Option(help="host:port of an etcd; by default one is started for the job.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU for each worker where there are some.")] = "cpu",
    report: Annotated[Path | None, typer.Option(help="Write figures to this JSON file.")] = None,
) -> None:
    """Trains a byte-level GPT; the same bits for any --workers and --stages."""
    if dim % heads:
        raise typer.BadParameter(f"--dim {dim} is not a multiple of --heads {heads}")
    if init not in ("eager", "deferred"):
        raise typer.BadParameter(f"--init {init}: use eager or deferred")
    if data is not None and not Path(data).is_file():
        raise typer.BadParameter(f"--data {data}: no such file")
    if checkpoint is None and (checkpoint_every, keep) != (None, None):
        raise typer.BadParameter("--checkpoint-every and --keep need --checkpoint, the directory to save into")
    given = dict(locals())
    options = {name: value for name, value in given.items() if name not in _OF_THE_JOB}
    job = {"workers": workers, "stages": stages or None, "respawn": respawn, "min_workers": min_workers, "etcd": etcd, "device": device}
    job["args"] = (options,)
    missed: tuple[Missed, ...] = ()
    with tempfile.TemporaryDirectory(prefix="elastic-gpt-") as directory:
        try:
            faults = [parse(text) for text in kill or ()]
            with Killer(directory, faults, seed) if faults else nullcontext() as killer:
                result = elastic.run(train, directory=directory, progress=False, **job)
                missed = killer.close() if killer is not None else ()
        except elastic.errors.ElasticError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
    if report is not None:
        report.write_text(json.dumps({**(result.value or {}), "incidents": result.incidents}, indent=1) + "\n")
    for fault in missed:
        print(f"error: {fault}", file=sys.stderr)
    if result.value is not None:
        print(f"digest {result.value['digest']}")
    if result.stopped:
        raise typer.Exit(130)
    if missed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
