"""Runs a train function in several forked processes that act as a job's workers: real links and engine, no agent."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch

from elastic.membership.founding import Ready, found
from elastic.settings import JobSettings
from elastic.view import View
from elastic.worker import job as jobs
from elastic.worker.told_steps import ToldSteps

TIMEOUT_S = 120

with tempfile.TemporaryDirectory() as _cache, pytest.MonkeyPatch.context() as _patch:
    _patch.setenv("TORCHINDUCTOR_CACHE_DIR", _cache)  # importing torch._dynamo makes a directory, which would stay in /tmp
    import torch._dynamo  # once here: otherwise the first optimizer imports it in every process

    import elastic.worker.trainer  # noqa: F401


class FakeJob:
    """The part of `elastic.Job` that a Trainer uses; `announce` asks the parent process."""

    links: str | None = None
    interface: str | None = None
    segment = None
    gpu = None
    joins = False
    segments: dict[int, Any] = {}  # noqa: RUF012
    threads = 1
    settings = JobSettings(name="test", workers=1, train_fn="m:f", isa="default")
    trace = None
    trains = False  # tests make one Trainer after the other
    steps = ToldSteps(lambda _: None, lambda: False)

    def __init__(self, worker: int, workers: int, pipe: Connection) -> None:
        self.worker, self.workers, self.host = worker, workers, "here"
        self.secret, self.tls = b"secret of a test", None
        self.profile = worker == 0
        self.exact, self.leader, self.recovers = True, worker == 0, False
        self.stop_requested = self.pause_requested = False
        self.progressed: list[tuple[int, int]] = []
        self.steps = ToldSteps(self.send, lambda: self.leader)
        self._pipe = pipe

    def announce(self, ready: dict[str, Any]) -> View:
        self._pipe.send(ready)
        return View.from_json(self._pipe.recv())

    def listen_on(self, waits: Any) -> None:
        pass

    def heard(self) -> None:
        self.error = None

    def pulse(self) -> None:
        pass

    def waits(self, peer: int | None) -> None:
        pass

    def loading(self, load: Any) -> Any:
        return load

    def during(self, place: str, call: Any, *arguments: Any) -> Any:
        return call(*arguments)

    def send(self, message: dict[str, Any]) -> None:
        """What an agent would be told, such as how a save ended."""

    def raised(self, error: BaseException) -> None:
        self.error = error

    def enter(self, phase: str, step: int, micro_batch: int = -1) -> None:
        pass

    def progress(self, epoch: int, step: int, *figures: Any, always: bool = False) -> None:
        self.progressed.append((epoch, step))


def agree(readies: list[dict[str, Any]], stages: int | None) -> dict[str, Any]:
    """What the agent makes of its workers' announcements."""
    return found({worker: Ready.from_json(ready, "here") for worker, ready in enumerate(readies)}, stages).to_json()


def _child(train: Callable[..., Any], worker: int, workers: int, pipe: Connection, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        job = FakeJob(worker, workers, pipe)
        jobs.enter(job)  # pyright: ignore[reportArgumentType]
        torch.manual_seed(0)
        pipe.send(("done", train(job, *args)))
        pipe.recv()  # until every worker is done: a link that closes earlier would look like a death
    except BaseException as error:
        pipe.send(("error", (type(error).__name__, str(error), traceback.format_exc())))
    finally:
        os._exit(0)


class WorkerError(Exception):
    """A worker raised: (type name, message)."""


def run(train: Callable[..., Any], *, workers: int, stages: int | None = None, args: tuple[Any, ...] = ()) -> list[Any]:
    """What `train(job, *args)` returned in each worker, which must be picklable; raises WorkerError with the first error."""
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for worker in range(workers):
        mine, theirs = context.Pipe()
        process = context.Process(target=_child, args=(train, worker, workers, theirs, args), daemon=True)
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    try:
        return _serve(pipes, stages)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _serve(pipes: list[Connection], stages: int | None) -> list[Any]:
    readies: dict[int, dict[str, Any]] = {}
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        heard = wait(pipes, timeout=TIMEOUT_S)
        assert heard, "the workers hang"
        for pipe in heard:
            worker = pipes.index(pipe)  # pyright: ignore[reportArgumentType]
            message = pipe.recv()  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(message, dict):
                readies[worker] = message
                if len(readies) == len(pipes):
                    view = agree([readies[place] for place in range(len(pipes))], stages)
                    for other in pipes:
                        other.send(view)
            elif message[0] == "error":
                raise WorkerError(*message[1])
            else:
                results[worker] = message[1]
    return [results[worker] for worker in range(len(pipes))]
