"""A driver with a fake crew that records messages, an etcd controlled by the test, and a fake clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from elastic.agent.carrier import LocalCarrier
from elastic.agent.segments import Segments
from elastic.agent.supervision import WorkerProcess
from elastic.control.driver import Driver
from elastic.control.world import World
from elastic.errors import Conflict
from elastic.host.rundir import RunDirectory
from elastic.membership.etcd_thread import EtcdTask
from elastic.membership.founding import found
from elastic.recovery.inventory import Inventory
from elastic.settings import JobSettings
from elastic.view import View
from tests.membership.test_founding import ready

FIRST_PID = 5_000_000  # above all that Linux gives: no process of this machine is meant


def view_of(workers: Iterable[int], epoch: int = 1, attempt: int = 0) -> View:
    view = found({worker: ready(profile=True) for worker in workers}, None)
    return dataclasses.replace(view, epoch=epoch, attempt=attempt)


class FakeCrew:
    """Notes what workers are told. The carrier in front of it is the real one."""

    forkserver = 77

    def __init__(self) -> None:
        self.workers: dict[int, WorkerProcess] = {}
        self.told: list[tuple[int, dict[str, Any]]] = []
        self.killed: dict[int, str] = {}
        self.segments = Segments(wanted=False)

    def fork(self, number: int, **role: Any) -> None:
        self.workers[number] = WorkerProcess(number=number, pid=FIRST_PID + number)

    def tell(self, numbers: Iterable[int], message: dict[str, Any], segments: Iterable[int] = ()) -> None:
        self.told += [(number, message) for number in numbers]

    def kill(self, number: int, why: str) -> None:
        self.killed[number] = why
        self.workers[number].kill(why)

    def messages(self, kind: str) -> list[int]:
        """Who was told so, since the last look."""
        found = [number for number, message in self.told if message["type"] == kind]
        self.told = [entry for entry in self.told if entry[1]["type"] != kind]
        return found


class FakeAttempts:
    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.error: Exception | None = None

    def _note(self, *call: Any) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append(call)

    def ask(self) -> None:
        pass

    def begin(self, attempt_id: Any) -> None:
        self._note("begin", attempt_id)

    def publish(self, attempt_id: Any, proposal: Any) -> None:
        self._note("publish", attempt_id)

    def vote(self, attempt_id: Any, votes: Any) -> None:
        self._note("vote", attempt_id, votes)

    def commit(self, attempt_id: Any, view: View, before: View) -> None:
        self._note("commit", attempt_id, view.workers, before.epoch)

    def sweep(self) -> None:
        self._note("sweep")


class FakeEtcdThread:
    """Does tasks at once, as long as etcd is there."""

    def __init__(self) -> None:
        self.away = False
        self.waiting: list[EtcdTask] = []

    def run(self, task: EtcdTask) -> None:
        self.waiting.append(task)
        if not self.away:
            self.work()

    def work(self) -> None:
        while self.waiting:
            task = self.waiting.pop(0)
            if not task.wanted():
                continue
            try:
                result = task.call()
            except Conflict as error:
                task.refused(error)
            else:
                task.done(result)


@dataclass
class FakeTimers:
    """`due` and `act` are of the machine's timer."""

    timers: dict[str, tuple[float, Callable[[], None]]] = field(default_factory=dict)

    @property
    def due(self) -> float | None:
        return self.timers.get("machine", (None,))[0]

    @property
    def act(self) -> Callable[[], None] | None:
        return self.timers.get("machine", (None, None))[1]

    def set_timer(self, seconds: float, act: Callable[[], None], name: str = "") -> None:
        self.timers[name] = seconds, act

    def clear_timer(self, name: str = "") -> None:
        self.timers.pop(name, None)


@dataclass
class Scene:
    driver: Driver
    crew: FakeCrew
    carrier: LocalCarrier
    attempts: FakeAttempts
    etcd_thread: FakeEtcdThread
    timers: FakeTimers
    directory: RunDirectory
    outcomes: list[dict[str, Any]]
    said: list[str]
    now: float = 50.0
    admitted: list[int] = field(default_factory=list)
    refuse: Exception | None = None
    conflicts: tuple[Any, ...] = ()
    computing: list[Callable[[], None]] | None = None  # what is computed aside, if it does not happen at once

    def compute(self, call: Callable[[], Any], done: Callable[[Any], None]) -> None:
        if self.computing is None:
            done(call())
        else:
            self.computing.append(lambda: done(call()))

    def say(self, worker: int, kind: str, **fields: Any) -> None:
        self.driver.heard(worker, {"type": kind, **fields})

    def commits(self, **fields: Any) -> None:
        """Each member says that the view's first step is committed."""
        for worker in self.driver.view.workers:
            self.say(worker, "committed", taken_over_s=0.0, **fields)

    def die(self, *workers: int, status: int = -9) -> None:
        dead = [self.crew.workers[worker] for worker in workers]
        for each in dead:
            each.gone, each.status = True, status
        self.driver.died(*map(self.carrier.death, dead))

    def propose(self, action: Any, stages: int | None) -> Any:
        if self.refuse is not None:
            raise self.refuse
        view = view_of(action.inventories, *action.attempt_id)
        told = {"planned": "", "finished": (), "leaving": (), "yielded": -1, "restore": None, "to_json": lambda: {"view": view.to_json()}}
        return SimpleNamespace(view=view, resume=11, bytes_minimum=900, segments=[], conflicts=self.conflicts, back=None, **told)

    def inventories(self) -> None:
        for worker in self.crew.messages("quiesce"):
            empty = Inventory(worker=worker, yielded=-1, copies=()).to_json()
            self.say(worker, "inventory", epoch=self.attempt_id[0], attempt=self.attempt_id[1], inventory=empty)

    def votes(self) -> None:
        for worker in self.crew.messages("propose"):
            times = {"installed": self.now - 0.003, "moved": self.now - 0.002, "checked": self.now}
            links = {"kept": 2, "dropped": 1, "made": 0}
            self.say(
                worker,
                "vote",
                epoch=self.attempt_id[0],
                attempt=self.attempt_id[1],
                refusal=None,
                received_bytes=450,
                links=links,
                times=times,
            )

    def resume(self) -> None:
        for worker in self.crew.messages("view"):
            self.say(worker, "resumed", epoch=self.attempt_id[0], attempt=self.attempt_id[1], at=self.now)

    @property
    def attempt_id(self) -> tuple[int, int]:
        return self.driver.state.attempt_id


def scene_of(tmp_path: Path, workers: int = 3, **options: Any) -> Scene:
    """A driver behind its first view; its run directory is `tmp_path`."""
    crew, attempts, etcd_thread, timers, directory = FakeCrew(), FakeAttempts(), FakeEtcdThread(), FakeTimers(), RunDirectory(tmp_path)
    outcomes: list[dict[str, Any]] = []
    said: list[str] = []
    for number in range(workers):
        crew.fork(number)
    made: list[Scene] = []
    carrier = LocalCarrier(crew, directory)
    world = World(
        carrier=carrier,
        timers=timers,
        etcd_thread=etcd_thread,
        attempts=attempts,
        directory=directory,
        end=outcomes.append,
        admit=lambda ready: made[0].admitted.extend(ready),
        dismiss=lambda workers: None,
        say=said.append,
        propose=lambda action, stages: made[0].propose(action, stages),
        clock=lambda: made[0].now if made else 50.0,
        compute=lambda call, done: made[0].compute(call, done),
    )
    settings = JobSettings(name="job", workers=workers, train_fn="m:f", isa="avx2", **{"respawn": False, **options})
    driver = Driver(world, settings, view_of(range(workers)), ready())
    made.append(Scene(driver, crew, carrier, attempts, etcd_thread, timers, directory, outcomes, said))
    assert crew.messages("view") == list(range(workers))
    return made[0]
