"""Faults that hit a job while it replaces a worker: another worker in the recovery, or the replacement before it is a member.

The moment can be missed: a recovery takes milliseconds, and a replacement joins soon. Then the fault is tried again with another first
victim, so that it does take effect; `Effect.missed` says how often, and why.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from contextlib import suppress

from elastic.chaos.hosts import Host, Target, stat_of
from elastic.chaos.inject.killing import ended_by_kill, killed
from elastic.chaos.inject.moments import NEAR_S, caught, standing_still
from elastic.chaos.injection import Injection
from elastic.chaos.scene import Effect, Hit, Missed, Scene, Vanished
from elastic.observe.activity import RECOVERY_PHASES, STEP_PHASES, Doing, read

_NEW_S, _RECOVERY_S, _MEMBERS_S, _JOINS_S = 120.0, 120.0, 120.0, 5.0
_LOOK_S, _START_S, _SELDOM = 0.001, 0.05, 40
_JOINING = ("migrate", "gate", "commit")


def kill_during_recovery(scene: Scene, effect: Effect) -> None:
    """Kills one worker, and another one as soon as that is in the recovery. Raises Missed if nobody was caught in it."""
    members = scene.wait("the job has two members that can be hit", lambda: len(found := scene.job.targets()) > 1 and found, _MEMBERS_S)
    first = members[effect.injection.place % len(members)]
    watch = _Watch(scene, [target for target in members if target.pid != first.pid], effect.injection.phase or RECOVERY_PHASES[0])
    killed(scene, effect, [first])
    effect.proof = None
    while True:
        second = scene.wait("another worker is in the recovery", watch.found, _RECOVERY_S, NEAR_S)
        try:
            with caught(second, watch.in_it) as there:
                if there:
                    killed(scene, effect, [second])
                    break
        except Vanished:
            raise Missed(f"worker {second.worker} ended by itself in the recovery") from None
    phase = effect.hits[-1].phase
    effect.proof = f"worker {first.worker} was killed, and worker {second.worker} in {phase} of the recovery"


class _Watch:
    """Looks for a worker in a phase of a recovery, or in a later one, if the phase is too short to be seen."""

    def __init__(self, scene: Scene, targets: Sequence[Target], phase: str) -> None:
        self._scene, self._targets, self._epoch, self._looks = scene, targets, scene.job.epoch, 0
        self._wanted = RECOVERY_PHASES[RECOVERY_PHASES.index(phase) :]

    def in_it(self, doing: Doing) -> bool:
        return doing.phase in self._wanted

    def found(self) -> Target | None:
        """A worker that can be hit now, None if there is none yet. Raises Missed if the recovery is over, or nobody else is left."""
        for target in self._targets:
            doing = target.doing()
            if doing is not None and self.in_it(doing) and (self._looks % _SELDOM or stat_of(target.pid) is not None):
                return target
        self._looks += 1
        if self._looks % _SELDOM == 0:
            if self._scene.job.epoch > self._epoch:
                raise Missed(f"the recovery was over before anybody was seen in {self._wanted[0]} or later")
            self._targets = [target for target in self._targets if stat_of(target.pid) is not None]
            if not self._targets:
                raise Missed("all others ended too, before they were in the recovery")
        return None


def kill_joiner(scene: Scene, effect: Effect) -> None:
    """Kills one worker, and its replacement before that is a member. Raises Missed if that was a member already."""
    first = scene.target(effect.injection.place)
    before = {pid for _, pid in _workers(scene)}
    killed(scene, effect, [first])
    effect.proof = None

    def new() -> tuple[Host, int] | None:
        return next((each for each in _workers(scene) if each[1] not in before and each[1] != first.pid), None)

    host, pid = scene.wait("a replacement is started", new, _NEW_S, _LOOK_S)
    _at_its_moment(scene, effect, host, pid)
    worker = _worker_of(host, pid)
    try:
        with standing_still(pid):
            if _is_member(scene, pid):
                raise Missed(f"the replacement (process {pid}) was a member already")
            effect.hits.append(Hit(pid=pid, worker=worker, host=host.number))
            ended_by_kill(pid)
    except Vanished:
        raise Missed(f"the replacement (process {pid}) ended by itself") from None
    if _is_member(scene, pid):
        raise Missed(f"the replacement (process {pid}) became a member as it was killed")
    effect.hits[-1].worker = _worker_of(host, pid) if worker is None else worker
    effect.proof = f"worker {first.worker} was killed, and its replacement (process {pid}) before it joined"


def _workers(scene: Scene) -> list[tuple[Host, int]]:
    """The processes of all workers, members or not, with their hosts."""
    return [(host, pid) for host in scene.job.present for pid in (*host.joiners(), *(target.pid for target in host.targets()))]


def moment_of(injection: Injection) -> int:
    """Which of four moments of a replacement's way into the job a fault hits; it follows from its text."""
    return random.Random(f"{injection}").randrange(4)


def _at_its_moment(scene: Scene, effect: Effect, host: Host, pid: int) -> None:
    """Waits for one of four moments of a replacement's way into the job: as it is started, in its start, and twice as it joins.

    Once a moment was missed, the first one is taken.
    """
    moment = 0 if effect.missed else moment_of(effect.injection)
    if moment == 1:
        scene.last(_START_S)
    if moment < 2:
        return

    def joins() -> bool:
        worker = _worker_of(host, pid)
        doing = None if worker is None else read(host.run, worker)
        if doing is None:
            return stat_of(pid) is None
        trains = doing.phase in STEP_PHASES or (doing.phase == "idle" and doing.step >= 0)
        return trains or doing.phase in _JOINING[moment - 2 :] or stat_of(pid) is None

    scene.last_until(joins, _JOINS_S, NEAR_S)  # a spare does not join


def _is_member(scene: Scene, pid: int) -> bool:
    return any(pid == each["pid"] for host in list(scene.job.hosts) for each in host.members["members"])


def _worker_of(host: Host, pid: int) -> int | None:
    """The number of a host's worker, from its activity record; None before it has one."""
    with suppress(OSError):
        for name in os.listdir(host.run / "activity"):
            doing = read(host.run, int(name)) if name.isdigit() else None
            if doing is not None and doing.pid == pid:
                return doing.worker
    return None
