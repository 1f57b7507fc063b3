"""Measures what saves cost a running job: AdamW, with saves and without, and a `torch.save` of as many bytes. Prints one JSON object.

    stall       seconds that a save blocks a worker's training thread, including the wait for other workers, as measured by the Trainer
    snapshot    the part of the stall in which the worker copies the state it owns; every step needs this copy for recovery, and the step
                after the save reuses the save's copy
    steps       median seconds of a step in a job without saves, and in a job with saves while a save is being written and otherwise

The two jobs alternate, on one disk. If all cores are computing, the work of the saving thread (digest, copy into the page cache) slows
the steps down.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from checkpoints import state_of
from report import write_json
from torch import nn

import elastic

_WIDTH = 1024
_SAMPLES = 16


def train(job: elastic.Job, layers: int, steps: int, directory: str | None, every: int) -> dict[str, Any]:
    """Trains; returns each step's seconds, whether a save was being written during it, and the stalls of every worker."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(layers)))
    where = {} if directory is None else {"checkpoint": directory, "every": every, "keep": 1}
    trainer = elastic.Trainer(
        model,
        lambda output, batch: output.square().mean(),
        torch.optim.AdamW(model.parameters(), fused=True),
        lambda step, micro_batch: torch.ones(_SAMPLES, _WIDTH),
        batch_size=8 * _SAMPLES,
        micro_batch_size=_SAMPLES,
        **where,
    )
    ends, saving = [], []
    for report in trainer.run(steps):
        ends.append(time.perf_counter())
        started = report.step > 0 and report.step % every == 0  # a save started after the previous step
        saving.append(directory is not None and (started or any(Path(directory).glob(".tmp-step-*"))))
    workers = trainer.statistics() or []
    return {
        "seconds": [after - before for before, after in itertools.pairwise(ends)],
        "saving": saving[1:],
        "stalls": [stall for worker in workers for stall in worker["save_stalls"]],
        "previous_bytes": sum(worker["previous_bytes"] for worker in workers),
    }


def torch_save_s(megabytes: int, root: Path) -> float:
    """Returns the seconds of a blocking `torch.save` with fsync."""
    state = {f"{name}/{kind}": tensor for (name, kind), tensor in state_of(megabytes).items()}
    began = time.perf_counter()
    with open(root / "torch", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    (root / "torch").unlink()
    return seconds


def measured(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Runs the jobs and returns the figures: seconds and ratios."""
    layers = max(1, options.megabytes // 12)
    plain: list[float] = []
    quiet: list[float] = []
    busy: list[float] = []
    stalls: list[list[float]] = []
    torch_s: list[float] = []
    previous_copies = {}
    for number in range(options.rounds):
        for directory in (None, str(root / str(number))):
            arguments = [layers, options.steps, directory, options.every]
            found = elastic.run(train, workers=options.workers, stages=options.stages, args=arguments, rebalance=False).value
            previous_copies["plain" if directory is None else "saving"] = found["previous_bytes"]
            for seconds, saving in zip(found["seconds"][2:], found["saving"][2:], strict=True):
                (plain if directory is None else busy if saving else quiet).append(seconds)
            stalls += found["stalls"]
        torch_s.append(torch_save_s(options.megabytes, root))
    beyond = [whole - snapshot for whole, snapshot in stalls]
    torch_median = statistics.median(torch_s)
    return {
        "bytes": layers * 12 * _WIDTH * _WIDTH,
        "workers": options.workers,
        "saves": len(stalls) // options.workers,
        "stall_s": {"median": statistics.median(whole for whole, _ in stalls), "largest": max(whole for whole, _ in stalls)},
        "snapshot_s": statistics.median(snapshot for _, snapshot in stalls),
        "beyond_snapshot_s": {"median": statistics.median(beyond), "largest": max(beyond)},
        "torch_save_s": torch_median,
        "beyond_snapshot_to_torch_save": statistics.median(beyond) / torch_median,
        "step_s": {name: statistics.median(each) if each else None for name, each in (("plain", plain), ("busy", busy), ("quiet", quiet))},
        "step_s_mean": {"plain": statistics.mean(plain), "saving": statistics.mean([*quiet, *busy])},
        "steps": {"plain": len(plain), "busy": len(busy), "quiet": len(quiet)},
        "previous_bytes": previous_copies,
    }


def main() -> None:
    """Prints the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None, help="write the object to this file too")
    parser.add_argument("--directory", type=Path, default=None, help="on the disk that is to be measured; a temporary one otherwise")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="checkpoint-benchmark-", dir=options.directory) as root:
        figures = measured(options, Path(root))
    print(json.dumps(figures, indent=2))
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
