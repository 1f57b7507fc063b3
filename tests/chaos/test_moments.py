"""Tests faults whose moment is missed, or whose victim has gone: they wait, or are tried again, so that they do take effect, and say so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic.chaos import scene as scenes
from elastic.chaos.hosts import Host, stat_of
from elastic.chaos.inject import INJECT
from elastic.chaos.inject.moments import standing_still
from elastic.chaos.inject.recoveries import moment_of
from elastic.chaos.injection import parse
from elastic.chaos.injector import Injector
from elastic.chaos.running import RunningJob
from elastic.chaos.scene import Effect, Hit, JobOver, NoEffect, Scene, Vanished
from elastic.chaos.schedule import JobSpec, Schedule
from tests.chaos.conftest import Stage

WAIT_S = 10.0


def until(met: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (found := met()):
        assert time.monotonic() < deadline, "it did not come"
        threading.Event().wait(0.001)
    return found


class Theatre:
    """A job of one host, whose workers are puppets, or processes that do nothing; the test decides who is a member."""

    def __init__(self, stage: Stage, tmp_path: Path) -> None:
        living: Any = SimpleNamespace(poll=lambda: None, pid=0)
        self.stage, self.spawned = stage, list[subprocess.Popen[bytes]]()
        self.job = RunningJob(schedule=Schedule(job=JobSpec(workers=3), injections=()), folder=tmp_path)
        self.job.hosts.append(Host(0, tmp_path, stage.directory, living))
        self.sampler: Any = SimpleNamespace(first_at=time.monotonic() - 100.0, step=50, highest=50)
        self.scene = Scene(self.job, self.sampler)

    def spawn(self) -> int:
        """Starts another process of the host, as an agent that replaces a worker."""
        self.spawned.append(subprocess.Popen(["sleep", "60"]))
        return self.spawned[-1].pid

    def members(self, epoch: int, *pids: int) -> None:
        listed = [{"worker": pid, "pid": pid} for pid in pids]
        new = self.stage.directory / "members.new"
        new.write_text(json.dumps({"epoch": epoch, "members": listed, "agent": 1, "forkserver": os.getpid()}))
        new.rename(self.stage.directory / "members.json")

    @contextmanager
    def fault(self, text: str) -> Iterator[Effect]:
        """Injects a fault in the background, until the end of the block."""
        injector = Injector(self.scene, (parse(text),))
        try:
            yield injector.effects[0]
            until(lambda: injector.done)
        finally:
            injector.close()


@pytest.fixture
def theatre(stage: Stage, tmp_path: Path) -> Iterator[Theatre]:
    made = Theatre(stage, tmp_path)
    yield made
    for process in made.spawned:
        process.kill()
        process.wait()


def joiner_fault(place: int, moment: int) -> str:
    """A fault that kills a replacement at this moment of its way into the job: 0 as it is started, 1 in its start, 2 and 3 as it joins."""
    return next(text for time in range(1, 50) if moment_of(parse(text := f"kill-joiner@{time}s place={place}")) == moment)


def gone(pid: int) -> bool:
    return stat_of(pid) is None


def test_a_replacement_that_is_a_member_already_is_not_the_one_to_kill(theatre: Theatre):
    """The first replacement becomes a member at once: the fault causes another one, and kills that before it joins."""
    one, two, three = (theatre.spawn() for _ in range(3))
    theatre.members(1, one, two)
    with theatre.fault(joiner_fault(1, 1)) as effect:
        until(lambda: gone(two))
        early = theatre.spawn()
        theatre.members(3, one, early)
        until(lambda: effect.missed)
        theatre.sampler.step += 1
        theatre.members(4, one, early, three)
        until(lambda: gone(early))
        theatre.members(5, one, three)
        late = theatre.spawn()
        until(lambda: gone(late))
    assert effect.missed == [f"the replacement (process {early}) was a member already"]
    assert effect.proof == f"worker {early} was killed, and its replacement (process {late}) before it joined"
    assert (effect.why, effect.over) == (None, False)
    assert [hit.pid for hit in effect.hits] == [two, early, late]
    assert not gone(one)
    assert not gone(three)


@pytest.mark.parametrize("moment", [0, 1])
def test_a_replacement_is_killed_before_it_joins(theatre: Theatre, moment: int):
    pids = [theatre.spawn() for _ in range(2)]
    theatre.members(1, *pids)
    with theatre.fault(joiner_fault(0, moment)) as effect:
        until(lambda: gone(pids[0]))
        new = theatre.spawn()
        until(lambda: gone(new))
    assert effect.proof == f"worker {pids[0]} was killed, and its replacement (process {new}) before it joined"
    assert effect.missed == []


def test_a_recovery_that_is_over_before_anybody_was_seen_in_it_is_caused_again(theatre: Theatre):
    one, two, three = theatre.stage.puppet(3)
    for puppet in (one, two, three):
        puppet.enter("forward", 50)
    theatre.stage.commit(1, [one, two, three])
    with theatre.fault("kill-during-recovery@1s:migrate place=0") as effect:
        assert one.dies()
        theatre.stage.commit(2, [two, three])
        until(lambda: effect.missed)
        theatre.stage.commit(3, [two, three])
        theatre.sampler.step += 1
        assert two.dies()
        three.enter("gate", 51, 3)
        assert three.dies()
    assert effect.missed == ["the recovery was over before anybody was seen in migrate or later"]
    assert effect.proof == "worker 1 was killed, and worker 2 in gate of the recovery"
    assert [(hit.worker, hit.phase) for hit in effect.hits] == [(0, "forward"), (1, "forward"), (2, "gate")]


def test_a_fault_that_never_finds_its_moment_says_how_often_it_tried(theatre: Theatre, monkeypatch: pytest.MonkeyPatch):
    def misses(scene: Scene, effect: Effect) -> None:
        raise scenes.Missed("it was too late")

    monkeypatch.setitem(INJECT, "kill", misses)
    monkeypatch.setattr(Injector, "_go_on", lambda _: None)
    with theatre.fault("kill@1s") as effect:
        pass
    assert (effect.proof, effect.why) == (None, "it missed its moment 5 times; the last time, it was too late")
    assert effect.missed == ["it was too late"] * 5


def test_a_phase_that_passes_is_hit_in_a_later_step_and_the_victim_stands_in_it(theatre: Theatre):
    (worker,) = theatre.stage.puppet(1)
    theatre.stage.commit(1, [worker])
    worker.enter("forward", 50)
    with theatre.fault("kill@50:apply") as effect:
        worker.enter("forward", 51)
        worker.enter("backward", 52)
        assert not effect.hits
        worker.enter("apply", 52)
        assert worker.dies()
    assert (effect.hits[0].phase, effect.hits[0].step, effect.missed) == ("apply", 52, [])


def test_a_phase_that_the_chosen_worker_is_never_in_is_hit_in_another_one(theatre: Theatre):
    chosen, other = theatre.stage.puppet(2)
    theatre.stage.commit(1, [chosen, other])
    chosen.enter("forward", 60)
    other.enter("gather", 60)
    with theatre.fault("kill@50:gather place=0") as effect:
        assert other.dies()
    assert (effect.hits[0].worker, effect.hits[0].phase) == (1, "gather")
    assert not gone(chosen.pid)


def test_a_phase_that_no_worker_is_ever_in_does_not_hold_the_fault_for_ever(theatre: Theatre):
    (worker,) = theatre.stage.puppet(1)
    theatre.stage.commit(1, [worker])
    worker.enter("backward", 71)
    with theatre.fault("kill@50:gather") as effect:
        assert worker.dies()
    assert effect.missed == ["nobody was seen in gather in 20 steps: it hit backward"]
    assert effect.proof == "ended by SIGKILL: worker 0"


def test_a_victim_that_ends_while_its_moment_is_awaited_is_replaced_by_another(theatre: Theatre):
    first, second = theatre.stage.puppet(2)
    theatre.stage.commit(1, [first, second])
    first.enter("forward", 49)
    second.enter("forward", 49)
    with theatre.fault("kill@50:apply place=0") as effect:
        os.kill(first.pid, signal.SIGKILL)
        assert first.dies()
        second.enter("apply", 50)
        assert second.dies()
    assert [hit.worker for hit in effect.hits] == [1]


def test_a_worker_that_another_fault_has_stopped_is_not_continued(theatre: Theatre):
    (worker,) = theatre.stage.puppet(1)
    worker.enter("apply", 50)
    os.kill(worker.pid, signal.SIGSTOP)
    until(lambda: (stat := stat_of(worker.pid)) is not None and stat.state == "T")
    with standing_still(worker.pid):
        pass
    stat = stat_of(worker.pid)
    assert stat is not None
    assert stat.state == "T"


def test_several_are_killed_only_when_so_many_are_members(theatre: Theatre, monkeypatch: pytest.MonkeyPatch):
    pids, looks, targets = [theatre.spawn() for _ in range(3)], list[int](), Host.targets
    monkeypatch.setattr(Host, "targets", lambda host: looks.append(1) or targets(host))
    theatre.members(1, pids[0])
    with theatre.fault("kill-many@1s count=3") as effect:
        until(lambda: len(looks) > 5)
        assert not effect.hits
        theatre.members(2, *pids)
        until(lambda: all(map(gone, pids)))
    assert len(effect.hits) == 3


class Etcd:
    """An etcd that counts who uses it at once."""

    def __init__(self) -> None:
        self.pid, self.users, self.most = 1, 0, 0

    def kill(self) -> None:
        self.users += 1
        self.most = max(self.most, self.users)

    def start(self) -> None:
        self.users -= 1

    def serves(self) -> bool:
        return False


def test_faults_of_etcd_come_one_after_another(theatre: Theatre):
    etcd: Any = Etcd()
    theatre.job.etcd = etcd
    injector = Injector(theatre.scene, tuple(map(parse, ["etcd-down@1s seconds=0.05", "etcd-down@1s seconds=0.05", "etcd-restart@1s"])))
    until(lambda: injector.done)
    injector.close()
    assert all(effect.proof for effect in injector.effects), [effect.why for effect in injector.effects]
    assert etcd.most == 1


@pytest.mark.parametrize("drawn", [True, False])
def test_a_random_fault_waits_until_the_job_has_gone_back_behind_a_bit_that_flipped(
    theatre: Theatre, monkeypatch: pytest.MonkeyPatch, drawn: bool
):
    """Until then the other copy of that state is the only one."""
    theatre.job.schedule = replace(theatre.job.schedule, drawn=drawn)
    one, two = theatre.spawn(), theatre.spawn()
    theatre.members(3, one, two)

    def flip(_: Scene, effect: Effect) -> None:
        effect.at, effect.proof = time.monotonic(), "a byte changed"
        effect.hits.append(Hit(pid=one, worker=one, host=0, epoch=3))

    monkeypatch.setitem(INJECT, "corrupt", flip)
    injector = Injector(theatre.scene, tuple(map(parse, ["corrupt@1s", "kill@100.5s place=1"])))
    flipped, kill = injector.effects
    until(lambda: flipped.proof)
    if drawn:
        threading.Event().wait(1.0)
        assert not gone(two)
        theatre.members(4, one, two)
    until(lambda: gone(two))
    until(lambda: injector.done)
    injector.close()
    assert kill.proof
    assert theatre.job.epoch == (4 if drawn else 3)


def test_a_host_is_drained_only_when_another_one_takes_part(theatre: Theatre, monkeypatch: pytest.MonkeyPatch):
    """To drain the only host would stop the job."""
    monkeypatch.setattr(Host, "agent", 7)
    looks = list[int]()

    def present(_: RunningJob) -> list[Host]:
        looks.append(1)
        return theatre.job.hosts * (2 if len(looks) > 3 else 1)

    monkeypatch.setattr(RunningJob, "present", property(present))
    assert theatre.scene.host(0, least=2) is theatre.job.hosts[0]
    assert len(looks) == 4


def test_a_job_that_ends_before_a_fault_is_due_or_has_a_victim_is_no_riddle(theatre: Theatre):
    theatre.scene.over.set()
    with pytest.raises(JobOver, match="the job ended before this was so: it has members"):
        theatre.scene.target(0)
    injector = Injector(theatre.scene, (parse("kill@9999"), parse("kill@1s")))
    injector.close()
    assert [(each.over, each.why) for each in injector.effects] == [(True, "the job ended before it was due")] * 2


def test_errors_that_allow_another_try_are_kinds_of_no_effect():
    assert all(issubclass(each, NoEffect) for each in (JobOver, Vanished, scenes.Missed))
