"""Checks the promise on one GPU, and measures what it costs there: one command, which prints JSON.

    python benchmarks/gpu.py

Without a GPU it says so and exits 3. Workers share the GPU. Every part is a job of its own: digests on several layouts, through a death and
the joining of its replacement, with dropout, with bf16 autocast and with bf16 parameters; a checkpoint that is saved on the GPU and
continued from; tokens per second against plain PyTorch with and without deterministic operations; what steps wait for the host's copies of
the state.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[1]))

import elastic
from elastic.chaos.faults import parse
from elastic.chaos.killer import Killer
from examples.gpt import Text, build_gpt, cross_entropy, read_text

NO_GPU = 3
LAYOUTS = [(1, 1), (2, 1), (2, 2), (3, 2), (4, 2)]
"""Workers and stages."""

Sizes = dict[str, Any]
LARGE: Sizes = {"layers": 12, "dim": 1024, "heads": 16, "seq": 512, "batch": 32, "micro_batch": 8, "steps": 20, "autocast": True}
SMALL: Sizes = {"layers": 4, "dim": 256, "heads": 8, "seq": 128, "batch": 16, "micro_batch": 2, "steps": 12}


def model_of(sizes: Sizes) -> nn.Sequential:
    """Builds the GPT of these sizes, with the same initial parameters in every process."""
    torch.manual_seed(0)
    model = build_gpt(sizes["layers"], sizes["dim"], sizes["heads"], sizes["seq"], sizes.get("dropout", 0.1))
    return model.bfloat16() if sizes.get("bf16") else model


def train(_job: elastic.Job, sizes: Sizes) -> dict[str, Any] | None:
    """Runs on every worker; returns digest, seconds of each step, and statistics."""
    model = model_of(sizes)
    trainer = elastic.Trainer(
        model,
        cross_entropy,
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        Text(read_text(None), sizes["seq"]),
        batch_size=sizes["batch"],
        micro_batch_size=sizes["micro_batch"],
        autocast=torch.bfloat16 if sizes.get("autocast") else None,
        checkpoint=sizes.get("checkpoint"),
    )
    stamps = [time.monotonic()]
    stamps += [time.monotonic() for _ in trainer.run(sizes["steps"])]
    digest, workers = trainer.digest(), trainer.statistics()
    if workers is None:
        return None
    seconds = [after - before for before, after in pairwise(stamps)]
    return {"digest": digest, "step_s": seconds, "copy_wait_s": max(each["copy_wait_s"] for each in workers)}


def plain(device: str, sizes: Sizes, *, deterministic: bool) -> float:
    """Trains the same model with plain PyTorch, and returns the median seconds of a step."""
    torch.use_deterministic_algorithms(deterministic)
    model = model_of(sizes).to(device)
    optimizer, text = torch.optim.AdamW(model.parameters(), lr=1e-3), Text(read_text(None), sizes["seq"])
    parts, seconds = sizes["batch"] // sizes["micro_batch"], []
    for step in range(sizes["steps"]):
        began = time.monotonic()
        for part in range(parts):
            first = step * sizes["batch"] + part * sizes["micro_batch"]
            samples = [text[place % len(text)] for place in range(first, first + sizes["micro_batch"])]
            tokens, wanted = (torch.stack(each).to(device) for each in zip(*samples, strict=True))
            with torch.autocast(device, torch.bfloat16, enabled=bool(sizes.get("autocast"))):
                loss = cross_entropy(model(tokens), (tokens, wanted))
            (loss / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        seconds.append(time.monotonic() - began)
    return median(seconds[2:])


class Checks:
    """Runs jobs on one kind of device, by the name of their train function."""

    def __init__(self, device: str, function: str) -> None:
        self._device, self._function = device, function

    def job(self, sizes: Sizes, workers: int = 1, stages: int = 1, *kills: str) -> dict[str, Any]:
        """Returns the value of a job in which workers are killed at these places and steps, such as `1@5`."""
        with (
            tempfile.TemporaryDirectory(prefix="elastic-gpu-") as directory,
            Killer(directory, [parse(each) for each in kills], 0) as killer,
        ):
            options: dict[str, Any] = {"workers": workers, "stages": stages, "device": self._device, "workers_per_device": 8}
            result = elastic.run(self._function, args=(sizes,), directory=directory, **options)
            stalls = [found["stall_ms"] for found in result.incidents]
            if killer.close():
                raise RuntimeError(f"not every fault of {kills} was injected")
        return {**result.value, "stalls_ms": stalls}

    def digests(self, sizes: Sizes) -> dict[str, Any]:
        """Returns whether all layouts, and a job that loses a worker and gets another, end with the same digest."""
        found = {f"{workers}x{stages}": self.job(sizes, workers, stages)["digest"] for workers, stages in LAYOUTS}
        killed = self.job(sizes, 2, 1, "1@4")
        found["a worker killed at step 4"] = killed["digest"]
        return {"equal": len(set(found.values())) == 1, "digests": found, "stalls_ms": killed["stalls_ms"]}

    def checkpoint(self, sizes: Sizes) -> dict[str, Any]:
        """Returns whether a job that continues from a checkpoint, on another layout, ends as one that was never interrupted."""
        with tempfile.TemporaryDirectory(prefix="elastic-gpu-") as directory:
            self.job({**sizes, "steps": sizes["steps"] // 2, "checkpoint": directory}, 2, 1)
            continued = self.job({**sizes, "checkpoint": directory}, 2, 2)
        return {"equal": continued["digest"] == self.job(sizes)["digest"]}

    def speed(self, sizes: Sizes, command: list[str]) -> dict[str, Any]:
        """Returns tokens per second of one worker and of plain PyTorch, and what steps waited for copies of the state."""
        ours, tokens = self.job(sizes), sizes["batch"] * sizes["seq"]
        peers = {}
        for name in ("plain", "plain, deterministic"):  # in processes of their own: settings must be made before the context
            arguments = [*command, "--peer", name, "--sizes", json.dumps(sizes)]
            peers[name] = float(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.split()[-1])
        rates = {"ours": tokens / median(ours["step_s"][2:]), **{name: tokens / seconds for name, seconds in peers.items()}}
        waited = ours["copy_wait_s"] / sum(ours["step_s"])
        return {"tokens_per_s": rates, "share_of_time_waited_for_copies": waited}


def bandwidth(device: str, size: int = 1 << 28) -> float:
    """Returns bytes per second of a copy to pinned host memory."""
    source, target = torch.empty(size, dtype=torch.uint8, device=device), torch.empty(size, dtype=torch.uint8, pin_memory=True)
    module, rates = torch.get_device_module(device), []
    for _ in range(5):
        module.synchronize()
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        module.synchronize()
        rates.append(size / (time.perf_counter() - began))
    return max(rates)


def main(
    device: Annotated[str, typer.Option(help="Kind of device.")] = "cuda",
    function: Annotated[str, typer.Option(help="Train function, whose module adds the device to torch if need be.")] = f"{__file__}:train",
    small: Annotated[bool, typer.Option("--small", help="Tiny models: checks only that everything runs.")] = False,
    peer: Annotated[str | None, typer.Option(hidden=True)] = None,
    sizes: Annotated[str, typer.Option(hidden=True)] = "{}",
) -> None:
    """Prints what was checked and measured as JSON; exits 1 if bits differ, 3 without a GPU."""
    if peer is not None:
        print(plain(device, json.loads(sizes), deterministic="deterministic" in peer))
        return
    if device == "cuda" and not torch.cuda.is_available():
        print("no GPU: torch cannot use CUDA on this machine, so nothing was checked", file=sys.stderr)
        raise typer.Exit(NO_GPU)
    few = {**SMALL, "layers": 1, "dim": 32, "heads": 2, "seq": 16, "steps": 6}
    check, tiny = Checks(device, function), few if small else SMALL
    found: dict[str, Any] = {"torch": torch.__version__, "device": device}
    found["digests, dropout"] = check.digests(tiny)
    found["digests, bf16 autocast"] = check.digests({**tiny, "autocast": True})
    found["digests, bf16 parameters"] = check.digests({**tiny, "bf16": True})
    found["checkpoint"] = check.checkpoint(tiny)
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name()
        found["copies_to_host_bytes_per_s"] = bandwidth(device)
        found["speed"] = check.speed(few if small else LARGE, [sys.executable, __file__])
    print(json.dumps(found, indent=1))
    if not all(each.get("equal", True) for each in found.values() if isinstance(each, dict)):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
