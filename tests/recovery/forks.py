"""A job in forked processes: real workers, links and migrations, and a minimal agent controlled by the test. No etcd."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from elastic.errors import GateRefused
from elastic.host.packed import unpacked
from elastic.membership.founding import Ready, found
from elastic.recovery.gate import check_proposal
from elastic.recovery.inventory import Inventory
from elastic.recovery.proposal import Proposal, propose
from elastic.settings import JobSettings
from elastic.view import Member, View
from elastic.worker import job as jobs
from elastic.worker.job import Job, WorkerSpec
from elastic.worker.trainer import Trainer
from tests import dynamo  # noqa: F401

TIMEOUT_S = 15
WIDTH, LAYERS, STEPS = 128, 4, 6

Message = dict[str, Any]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def batch(step: int, micro_batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    base = 4 * step + micro_batch
    return torch.sin(torch.arange(2 * WIDTH) * 0.1 + base).view(2, WIDTH), torch.tensor([base % 7, 3])


def train(job: Job) -> dict[str, Any]:
    torch.manual_seed(5)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)) for _ in range(LAYERS)]
    trainer = Trainer(
        layers,
        lambda output, given: functional.cross_entropy(output, given[1]),
        lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        batch,
        batch_size=8,
        micro_batch_size=2,
    )
    reports = [(report.step, report.loss, report.grad_norm) for report in trainer.run(STEPS)]
    return {"reports": reports, "digest": trainer.digest()}


def when(job: Job, phase: str, step: int, act: Callable[[], None], epoch: int = 1) -> None:
    """Has this worker act when it enters the phase of the step in that epoch."""
    enter = job.enter

    def entered(entering: str, at: int, micro_batch: int = -1) -> None:
        enter(entering, at, micro_batch)
        if (entering, at, job.epoch) == (phase, step, epoch):
            act()

    job.enter = entered  # pyright: ignore[reportAttributeAccessIssue]


Prepare = Callable[[Job], None]
Train = Callable[[Job], dict[str, Any]]


def _child(prepare: Prepare, train: Train, worker: int, workers: int, pipe: Connection, directory: str) -> None:
    torch.set_num_threads(1)
    sending = threading.Lock()

    def send(message: Message) -> None:
        with sending:
            pipe.send(message)

    settings = JobSettings(name="job", workers=workers, train_fn="m:f", isa="default")
    spec = WorkerSpec(worker=worker, host="here", directory=directory, secret="5e", settings=settings, joins=worker >= workers)
    job = Job(spec, send)

    def listen() -> None:
        while True:
            job.deliver(pipe.recv())

    threading.Thread(target=listen, daemon=True).start()
    try:
        jobs.enter(job)
        prepare(job)
        send({"type": "done", "result": train(job)})
        job.dismissed.wait()
    except BaseException as error:
        send({"type": "error", "text": f"{type(error).__name__}: {error}\n{traceback.format_exc()}"})
    finally:
        os._exit(0)


class WorkerFailed(Exception):
    """A worker raised."""


@dataclass
class Agent:
    """`at_commit` is called when all have voted, before anybody hears of it; `committed` when the members were told.

    With fewer than `least` members it waits for a new worker, which is started then.
    """

    workers: int
    stages: int
    prepare: Prepare = lambda job: None
    train: Train = train
    least: int = 1
    at_commit: Callable[[Agent], None] = lambda agent: None
    committed: Callable[[Agent], None] = lambda agent: None
    view: View | None = None
    attempt: int = 0
    live: list[int] = field(default_factory=list)
    starting: list[int] = field(default_factory=list)
    joiners: dict[int, Member] = field(default_factory=dict)
    pipes: dict[int, Connection] = field(default_factory=dict)
    readies: dict[int, Ready] = field(default_factory=dict)
    inventories: dict[int, Inventory] = field(default_factory=dict)
    votes: dict[int, Message] = field(default_factory=dict)
    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    proposals: list[Proposal] = field(default_factory=list)
    first_steps: dict[int, int] = field(default_factory=dict)

    def run(self) -> Agent:
        self._processes = []
        with tempfile.TemporaryDirectory() as self._directory:
            for _ in range(self.workers):
                self._start()
            self.live, self.starting = self.starting, []
            try:
                while len(self.results) < len(self.live):
                    self._hear()
            finally:
                for process in self._processes:
                    process.kill()
                    process.join()
        return self

    @property
    def started(self) -> int:
        """Returns the number of workers started, including replacements."""
        return len(self._processes)

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        worker = len(self._processes)
        self.pipes[worker], theirs = context.Pipe()
        args = (self.prepare, self.train, worker, self.workers, theirs, self._directory)
        self._processes.append(context.Process(target=_child, args=args, daemon=True))
        self._processes[-1].start()
        theirs.close()
        self.starting.append(worker)

    def kill(self, *workers: int) -> None:
        """All at once: the next attempt is without all of them."""
        for worker in workers:
            self._processes[worker].kill()
            self._processes[worker].join()
            self.live.remove(worker)
            self.joiners.pop(worker, None)
        for _ in range(self.least - len(self.live) - len(self.starting)):
            self._start()
        if len(self.live) >= self.least:
            self._open()

    @property
    def attempt_id(self) -> tuple[int, int]:
        assert self.view is not None
        return self.view.epoch + 1, self.attempt

    def tell(self, message: Message) -> None:
        for worker in self.live:
            with suppress(BrokenPipeError):  # it has died; the next event reports that
                self.pipes[worker].send(message)

    def _hear(self) -> None:
        heard = wait([self.pipes[worker] for worker in (*self.live, *self.starting)], timeout=TIMEOUT_S)
        assert heard, f"workers {self.live} hang in attempt {self.attempt}"
        for worker in (*self.live, *self.starting):
            if self.pipes[worker] not in heard or worker not in (*self.live, *self.starting):
                continue
            try:
                message = self.pipes[worker].recv()
            except (EOFError, ConnectionResetError):
                if worker in self.live:
                    self.kill(worker)
                continue
            handler = getattr(self, f"_hear_{message['type']}", None)
            if handler is not None:
                handler(worker, message)

    def _hear_announce(self, worker: int, message: Message) -> None:
        if worker in self.starting:
            self.starting.remove(worker)
            self.live.append(worker)
            self.joiners[worker] = Ready.from_json(message["ready"], "here").member(worker)
            if len(self.live) >= self.least:
                self._open()
            return
        profile = [[0.1, 0.2, 9, 1000]] * LAYERS if worker == 0 else None  # the plan must not depend on this machine's speed
        self.readies[worker] = Ready.from_json({**message["ready"], "profile": profile}, "here")
        if len(self.readies) == self.workers:
            self.view = found(self.readies, self.stages)
            self.tell({"type": "view", "view": self.view.to_json()})

    def _open(self) -> None:
        assert self.view is not None
        self.attempt += 1
        self.inventories, self.votes = {}, {}
        lost = [worker for worker in self.view.workers if worker not in self.live]
        self.tell({"type": "quiesce", "epoch": self.attempt_id[0], "attempt": self.attempt_id[1], "lost": lost, "restore": False})

    def _hear_inventory(self, worker: int, message: Message) -> None:
        if (message["epoch"], message["attempt"]) != self.attempt_id:
            return
        assert self.view is not None
        self.inventories[worker] = Inventory.from_json(unpacked(message["inventory"]))
        if len(self.inventories) == len(self.live):
            survivors = {worker: found for worker, found in self.inventories.items() if worker not in self.joiners}
            proposal = propose(last=self.view, attempt=self.attempt, inventories=survivors, joiners=self.joiners, stages=self.stages)
            check_proposal(proposal, self.view)
            self.proposals.append(proposal)
            self.tell({"type": "propose", "proposal": proposal.to_json()})

    def _hear_vote(self, worker: int, message: Message) -> None:
        if (message["epoch"], message["attempt"]) != self.attempt_id or message["failed_peer"] is not None:
            return
        if message["refusal"] is not None:
            raise GateRefused(message["refusal"], check="vote")
        self.votes[worker] = message
        if len(self.votes) < len(self.live):
            return
        attempt = self.attempt
        at_commit, self.at_commit = self.at_commit, lambda agent: None
        at_commit(self)
        if self.attempt != attempt:
            return
        self.view, self.attempt, self.joiners = self.proposals[-1].view, 0, {}
        self.tell({"type": "view", "view": self.view.to_json()})
        committed, self.committed = self.committed, lambda agent: None
        committed(self)

    def _hear_committed(self, worker: int, message: Message) -> None:
        self.first_steps.setdefault(message["epoch"], message["step"])

    def _hear_done(self, worker: int, message: Message) -> None:
        self.results[worker] = message["result"]

    def _hear_error(self, worker: int, message: Message) -> None:
        raise WorkerFailed(message["text"])


def run(workers: int, stages: int = 1, **options: Any) -> Agent:
    """The agent when all are done. Raises what a proposal or a vote is refused with, and WorkerFailed."""
    return dataclasses.replace(Agent(workers, stages), **options).run()
