"""Runs one side once, in new processes, and measures time in the same way for both."""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import elastic
from elastic.host.process import tied_command
from elastic.settings import HUGE_PAGES, best_isa, own_environment, worker_environment

SEQ = 128  # tokens per sample
_HERE = Path(__file__).resolve().parent
_TIMEOUT_S = 600.0
_SAME_LOSS = 1e-4


class BenchmarkError(Exception):
    """Raised if a side failed, or if the two sides did not do the same work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a run trains. `batch` and `micro_batch` are in samples; `steps` are timed, after `warm_up` untimed ones (at least 1)."""

    workers: int
    stages: int
    batch: int
    micro_batch: int
    warm_up: int
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """The result of a run: seconds of the timed steps, seconds from start to the end of the first step, losses, layers per stage, and when
    the last step ended (`time.monotonic()`)."""

    step_s: tuple[float, ...]
    first_step_s: float
    losses: tuple[float, ...]
    cut: tuple[int, ...]
    last_at: float

    @property
    def median_s(self) -> float:
        return statistics.median(self.step_s)

    def to_json(self) -> dict[str, Any]:
        return {
            "median_step_s": self.median_s,
            "step_s": self.step_s,
            "first_step_s": self.first_step_s,
            "losses": self.losses,
            "cut": self.cut,
        }


def run_ours(task: Task, train: str = "train", **options: Any) -> Measurement:
    """Runs a job of `elastic.run` with these options, timed at the leader's yields. `train` names a function of ours.py.

    Step k is yielded when step k + 1 is ready on all workers; only the last step is yielded after an empty round. The job therefore takes
    one more step, which is not timed.
    """
    started = time.monotonic()
    return _run(task, started, _job(task, task.warm_up + task.steps + 1, train, **options))


def run_peer(task: Task, kind: str, cut: Sequence[int], *, micro_batch: int, bucket_mb: float | None) -> Measurement:
    """Runs ranks of `peers.py`; `kind` is `ddp` or `pipeline`. `micro_batch` replaces the task's."""
    started = time.monotonic()
    task = replace(task, micro_batch=micro_batch)
    return _run(task, started, _ranks(task, kind, cut, task.warm_up + task.steps, bucket_mb) | {"cut": cut})


def startup_of_ours(task: Task) -> float:
    """Returns seconds from the call of `elastic.run` until its leader yields the first step, in a job of one step."""
    started = time.monotonic()
    return _job(task, 1)["stamps"][0] - started


def startup_of_ddp(task: Task) -> float:
    """Returns seconds from the start of the ranks until the first step has ended on rank 0."""
    started = time.monotonic()
    return _ranks(task, "ddp", (), 1, bucket_mb=None)["stamps"][0] - started


def check_same_work(ours: Measurement, peer: Measurement) -> None:
    """Raises BenchmarkError unless the first two losses agree, which depend on data, initial parameters, gradients and update."""
    for step, (a, b) in enumerate(zip(ours.losses[:2], peer.losses[:2], strict=True)):
        if abs(a - b) > _SAME_LOSS * abs(a):
            raise BenchmarkError(f"the loss of step {step} is {a} for ours and {b} for the peer: they do not train the same thing")


def _run(task: Task, started: float, found: Mapping[str, Any]) -> Measurement:
    stamps = found["stamps"][task.warm_up - 1 : task.warm_up + task.steps]
    return Measurement(
        step_s=tuple(after - before for before, after in pairwise(stamps)),
        first_step_s=found["stamps"][0] - started,
        losses=tuple(found["losses"]),
        cut=tuple(found["cut"]),
        last_at=found["stamps"][-1],
    )


def _job(task: Task, steps: int, train: str = "train", **options: Any) -> dict[str, Any]:
    # By name: importing the function would load torch in this process.
    name = f"{_HERE / 'ours.py'}:{train}"
    result = elastic.run(name, workers=task.workers, stages=task.stages, args=(task.batch, task.micro_batch, steps), **options)
    if result.stopped:
        raise KeyboardInterrupt
    return result.value


def _ranks(task: Task, kind: str, cut: Sequence[int], steps: int, bucket_mb: float | None) -> dict[str, Any]:
    settings = {
        "kind": kind,
        "batch": task.batch,
        "micro_batch": task.micro_batch,
        "steps": steps,
        "cut": list(cut),
        "bucket_mb": bucket_mb,
    }
    command = tied_command([sys.executable, str(_HERE / "peers.py"), json.dumps(settings)])
    environment = {**peer_environment(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(task.workers)}
    with ExitStack() as stack:
        said, complaints = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
        ranks: list[subprocess.Popen[bytes]] = []
        stack.callback(reap, ranks)
        for rank in range(task.workers):
            output = said if rank == 0 else subprocess.DEVNULL
            own = {**environment, "RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=own, stdin=subprocess.DEVNULL, stdout=output, stderr=complaints))
        _wait(ranks, complaints)
        said.seek(0)
        return json.loads(said.read().splitlines()[-1])


def _wait(ranks: Sequence[subprocess.Popen[bytes]], complaints: IO[str]) -> None:
    """Waits until all ranks have ended. Raises BenchmarkError as soon as one has failed."""
    deadline = time.monotonic() + _TIMEOUT_S
    while running := [rank for rank in ranks if rank.poll() is None]:
        if time.monotonic() > deadline or any(rank.returncode for rank in ranks):
            break
        try:
            running[0].wait(0.5)
        except subprocess.TimeoutExpired:
            continue
    if any(rank.returncode != 0 for rank in ranks):
        complaints.seek(0)
        raise BenchmarkError(f"the peer's ranks ended with {[rank.returncode for rank in ranks]}:\n{complaints.read()[-4000:]}")


def peer_environment() -> dict[str, str]:
    """Returns the environment of our workers, with Gloo on loopback."""
    return {**HUGE_PAGES, **own_environment(), **worker_environment(1, best_isa()), "GLOO_SOCKET_IFNAME": "lo"}


def reap(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kills these processes and waits until they have ended."""
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.wait()


def free_port() -> int:
    """Returns a port of loopback that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
