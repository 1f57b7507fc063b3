"""A job that is disturbed from outside while it runs, and how it ended: for `kill_table.py`."""

from __future__ import annotations

import json
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from gpt import StepLog, Text, build_gpt, cross_entropy, read_steps

import elastic
from elastic.chaos.faults import Fault
from elastic.chaos.killer import Killer
from elastic.observe import phase_delay
from elastic.observe.activity import ActivityReader, Doing
from elastic.observe.json_lines import append_lines
from elastic.settings import SEGMENTS

T = TypeVar("T")

WORKERS, STAGES = 4, 3
STEP, STEPS = 8, 14
LONG_STEPS, LONG_PAUSE_S = 60, 0.06
"""For jobs that must last until a new worker has joined: their steps, and a pause after each step until then."""

SAVED_EVERY = 2
DELAY_S = 0.04
GONE_S = 3.0


def train(job: elastic.Job, steps: int, pause_s: float, saved: str | None) -> dict[str, Any] | None:
    """Runs on every worker: a GPT with dropout, tied embeddings, clipping and a scheduler. `saved` is the checkpoint directory, if any."""
    torch.manual_seed(0)
    model = build_gpt(3, 64, 4, 64, dropout=0.1, tied=True)
    trainer = elastic.Trainer(
        model,
        cross_entropy,
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        Text(bytes(i * i % 251 for i in range(1 << 14)), 64),
        batch_size=16,
        micro_batch_size=2,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps),
        clip_norm=0.5,
        checkpoint=saved,
        every=SAVED_EVERY if saved else None,
    )
    with StepLog(Path(job.directory), job.worker) as log:
        for report in trainer.run(steps):
            log.add(report)
            if job.view is not None and max(job.view.workers) < job.workers:
                time.sleep(pause_s)
            if saved and report.step < STEP:
                time.sleep(LONG_PAUSE_S)  # time for the save
    digest = trainer.digest()
    if not trainer.leader:
        return None
    return {"digest": digest, "losses": [step["loss"] for step in read_steps(Path(job.directory))]}


# Faults


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """One killed process: `asked` is the requested phase ("" for any), `observed` the phase it was in; None if it did not die."""

    at: float
    asked: str
    observed: str | None

    def __str__(self) -> str:
        return (self.observed or "still alive") + (f" (not {self.asked})" if self.missed else "")

    @property
    def missed(self) -> bool:
        """Whether another phase was hit."""
        return self.asked not in ("", self.observed)


class Over(Exception):
    """The job has ended."""


class Scene:
    """A running job, observed from outside, on which a plan acts. `faulted` is the time of its last fault."""

    def __init__(self, directory: Path, plan: Callable[[Scene], None]) -> None:
        self.directory = directory
        self.faulted: float | None = None
        self.missed: list[str] = []
        self.hits: list[Hit] = []
        self._killer: Killer | None = None
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._act, args=(plan,), daemon=True)
        self._thread.start()

    def _act(self, plan: Callable[[Scene], None]) -> None:
        try:
            plan(self)
        except Over:
            self.missed.append("the job was over before its turn")
        except BaseException as error:
            self._error = error

    def close(self) -> list[Hit]:
        """Stops the plan and returns the hits; call it when the job is over."""
        self._over.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        if self._killer is not None:
            self.missed += map(str, self._killer.close())
            for shot in self._killer.shots:
                self.faulted = max(self.faulted or 0.0, shot.at)
                here = shot.observed is not None and (shot.fault.in_recovery or shot.observed.step == shot.fault.step)
                observed = None if shot.observed is None else shot.observed.phase if here else f"{shot.observed.phase} {shot.observed.step}"
                # Several die at once when the first of them is in the requested phase.
                asked = shot.fault.phase or "" if shot.place == shot.fault.places[0] else ""
                self.hits.append(Hit(at=shot.at, asked=asked, observed=observed))
        self.hits.sort(key=lambda hit: hit.at)
        return self.hits

    def members(self, epoch: int = 1) -> dict[str, Any]:
        """Returns the contents of members.json, as soon as they are of this epoch or a later one."""

        def read() -> dict[str, Any] | None:
            with suppress(FileNotFoundError):
                record = json.loads((self.directory / "members.json").read_text())
                return record if record["epoch"] >= epoch else None
            return None

        return self.until(read)

    def until(self, condition: Callable[[], T | None]) -> T:
        """Waits until `condition` returns a true value, and returns it. Raises Over."""
        while not self._over.is_set():
            if found := condition():
                return found
            self._over.wait(0.0003)
        raise Over

    def seen(self, worker: int, phase: str | None, epoch: int, step: int = -1) -> Doing:
        """Waits until the worker is in this phase of this epoch, at this step or a later one. Returns its activity."""
        watch = self.until(lambda: self._watch(worker))

        def look() -> Doing | None:
            doing = watch.read()
            there = doing is not None and phase in (None, doing.phase) and doing.epoch == epoch and doing.step >= step
            return doing if there else None

        return self.until(look)

    def _watch(self, worker: int) -> ActivityReader | None:
        with suppress(FileNotFoundError):
            return ActivityReader(self.directory, worker)
        return None

    def shoot(self, *faults: Fault) -> None:
        """Injects faults by the runtime's own injector."""
        self._killer = Killer(self.directory, faults)

    def hit(self, worker: int, phase: str, epoch: int) -> None:
        """Kills a worker, a member or not, in this phase of this epoch."""
        doing = self.seen(worker, phase, epoch)
        pidfd = os.pidfd_open(doing.pid)
        try:
            self.faulted = time.monotonic()
            line = {"at": self.faulted, "worker": worker, "pid": doing.pid, "step": doing.step, "phase": doing.phase, "kind": "kill"}
            append_lines(self.directory / "faults.jsonl", [line])
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            dead = select.select([pidfd], [], [], GONE_S)[0]
            watch = self._watch(worker)
            last = watch.read() if dead and watch is not None else None
            self.hits.append(Hit(at=self.faulted, asked=phase, observed=None if last is None else last.phase))
        finally:
            os.close(pidfd)

    def end(self, process: str) -> None:
        """Sends SIGKILL to the agent or the fork server."""
        self.faulted = time.monotonic()
        os.kill(self.members()[process], signal.SIGKILL)
        self.hits.append(Hit(at=self.faulted, asked="", observed=f"step {STEP}"))


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a job that cannot continue must end: the class of the error, and patterns that its message must match."""

    error: str
    says: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KillCell:
    """One job: its faults, the phases in which its workers wait, and how it must end (None: with the results of the undisturbed job).

    `deaths` is the number of incidents that the deaths must cause, if known. With `joins` the job lasts until a new worker has joined. A
    job that `saves` checkpoints must reload one only without `segments`.
    """

    name: str
    plan: Callable[[Scene], None]
    delays: tuple[str, ...] = ()
    end: End | None = None
    deaths: int | None = None
    joins: bool = False
    respawn: bool = False
    saves: bool = False
    segments: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a job ended, and the processes and files that it left."""

    result: elastic.JobResult | None
    error: Exception | None
    ended: float
    left: list[str]
    log: str


def run_job(directory: Path, cell: KillCell | None, *, joins: bool) -> tuple[Outcome, Scene | None]:
    """Runs a job in `directory`. Its processes have the subdirectory `tmp` as TMPDIR, by which they are found when it is over."""
    run, tmp = directory / "run", directory / "tmp"
    run.mkdir()
    tmp.mkdir()
    if cell is not None and cell.delays:
        phase_delay.write(run, cell.delays, DELAY_S, STEP)
    scene = None if cell is None else Scene(run, cell.plan)
    saved = str(directory / "saved") if cell is not None and cell.saves else None
    result = error = None
    with _quiet(directory / "log", tmp, segments=cell is None or cell.segments):
        try:
            result = elastic.run(
                train,
                workers=WORKERS,
                stages=STAGES,
                args=[*([LONG_STEPS, LONG_PAUSE_S if cell else 0.0] if joins else [STEPS, 0.0]), saved],
                respawn=cell is not None and cell.respawn,
                directory=run,
            )
        except elastic.errors.ElasticError as caught:
            error = caught
    ended = time.monotonic()
    return Outcome(result=result, error=error, ended=ended, left=_left(tmp), log=(directory / "log").read_text()), scene


@contextmanager
def _quiet(log: Path, tmp: Path, *, segments: bool) -> Iterator[None]:
    """Redirects standard error of this process and its children to the file `log`, and sets their TMPDIR to `tmp`."""
    names = {"TMPDIR": str(tmp), **({} if segments else {SEGMENTS: "0"})}
    kept, before = os.dup(2), {name: os.environ.get(name) for name in names}
    with log.open("wb") as file:
        os.dup2(file.fileno(), 2)
    os.environ.update(names)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _left(tmp: Path) -> list[str]:
    """Returns the processes and temporary files of a job that remain some time after its end."""
    mark, deadline = f"TMPDIR={tmp}".encode(), time.monotonic() + GONE_S
    while True:
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(f"process {entry.name} ({(entry / 'comm').read_text().strip()})")
        found += [f"file {path}" for path in tmp.iterdir()]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.02)
