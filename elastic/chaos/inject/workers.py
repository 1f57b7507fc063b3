"""Faults of worker processes: signals."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress

from elastic.chaos.hosts import Target, held, stat_of
from elastic.chaos.scene import Effect, Hit, NoEffect, Scene, Vanished
from elastic.observe.activity import RECOVERY_PHASES, read

_DEATH_S, _NEW_S, _RECOVERY_S = 5.0, 60.0, 20.0
_PERIOD_S, _NEAR_S, _SELDOM = 0.1, 0.0005, 40


def _killed(scene: Scene, effect: Effect, targets: Sequence[Target]) -> None:
    """Kills workers together, and waits for their ends."""
    with ExitStack() as stack:
        try:
            descriptors = [stack.enter_context(held(target.pid)) for target in targets]
        except ProcessLookupError:
            raise Vanished("a victim ended by itself just before") from None
        if any(select.select([descriptor], [], [], 0)[0] for descriptor in descriptors):
            raise Vanished("a victim ended by itself just before")
        hits = [scene.hit(effect, target) for target in targets]
        effect.at = time.monotonic()
        for descriptor in descriptors:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        for target, descriptor, hit in zip(targets, descriptors, hits, strict=True):
            if not select.select([descriptor], [], [], _DEATH_S)[0]:
                raise NoEffect(f"worker {target.worker} (process {target.pid}) still lives {_DEATH_S:g} s after SIGKILL")
            doing = target.doing()
            if doing is not None:
                hit.epoch, hit.step, hit.phase = doing.epoch, doing.step, doing.phase
    names = ", ".join(str(target.worker) for target in targets)
    effect.proof = f"ended by SIGKILL: worker{'s' * (len(targets) > 1)} {names}"


def kill(scene: Scene, effect: Effect) -> None:
    """Kills one worker."""
    _killed(scene, effect, [scene.at_phase(effect)])


def kill_many(scene: Scene, effect: Effect) -> None:
    """Kills several workers of one host at once."""
    first = scene.at_phase(effect)
    known = first.host.targets()
    places = [target.place for target in known]
    start = places.index(first.place) if first.place in places else 0
    ring = known[start:] + known[:start]
    _killed(scene, effect, ring[: effect.injection.count])


def stop(scene: Scene, effect: Effect) -> None:
    """Stops one worker, and continues it later if it still lives."""
    target = scene.at_phase(effect)
    try:
        with held(target.pid) as descriptor:
            scene.hit(effect, target)
            effect.at = time.monotonic()
            signal.pidfd_send_signal(descriptor, signal.SIGSTOP)
            scene.wait("the process is stopped", lambda: (s := stat_of(target.pid)) is None or s.state == "T", 2.0, _NEAR_S)
            if stat_of(target.pid) is None:
                raise NoEffect("it ended before it was stopped")
            effect.proof = f"worker {target.worker} was seen stopped"
            ends = effect.at + effect.injection.lasts_s
            while time.monotonic() < ends and not scene.over.is_set() and not select.select([descriptor], [], [], 0.05)[0]:
                pass
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGCONT)
    except ProcessLookupError:
        raise Vanished("the victim ended by itself just before") from None


def slow(scene: Scene, effect: Effect) -> None:
    """Stops and continues one worker in turns."""
    target, stopped = scene.at_phase(effect), 0
    try:
        with held(target.pid) as descriptor:
            scene.hit(effect, target)
            effect.at = time.monotonic()
            share, ends = 1 / effect.injection.strength, effect.at + effect.injection.lasts_s
            try:
                while time.monotonic() < ends and not scene.over.is_set():
                    signal.pidfd_send_signal(descriptor, signal.SIGSTOP)
                    scene.over.wait(_PERIOD_S * (1 - share))
                    stat = stat_of(target.pid)
                    stopped += stat is not None and stat.state == "T"
                    signal.pidfd_send_signal(descriptor, signal.SIGCONT)
                    scene.over.wait(_PERIOD_S * share)
            finally:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(descriptor, signal.SIGCONT)
    except ProcessLookupError:
        pass  # it was evicted, or killed by another fault
    if not stopped:
        raise NoEffect("it was never seen stopped")
    effect.proof = f"worker {target.worker} was seen stopped {stopped} times"


def kill_during_recovery(scene: Scene, effect: Effect) -> None:
    """Kills one worker, and another one as soon as that is in the recovery."""
    first = scene.target(effect.injection.place)
    epoch = scene.job.epoch
    others = [target for target in scene.job.targets() if target.pid != first.pid]
    _killed(scene, effect, [first])
    try:
        if not others:
            raise NoEffect("no other worker was left")
        watch = _Watch(scene, others, effect.injection.phase or RECOVERY_PHASES[0], epoch)
        second = scene.wait("another worker is in the recovery", watch.found, _RECOVERY_S, _NEAR_S)
    except NoEffect as error:
        effect.proof = None
        raise NoEffect(f"the first victim died, but {error}") from None
    _killed(scene, effect, [second])
    last = effect.hits[-1]
    if last.phase not in RECOVERY_PHASES and not (last.epoch or 0) <= epoch:
        effect.proof = None
        raise NoEffect(f"the second victim died in {last.phase} of epoch {last.epoch}, when the recovery was over")
    effect.proof = f"worker {first.worker} was killed, and worker {second.worker} in {last.phase} of the recovery"


class _Watch:
    """Looks for a worker in a phase of a recovery, or in a later one, if the phase is too short to be seen."""

    def __init__(self, scene: Scene, targets: Sequence[Target], phase: str, epoch: int) -> None:
        self._scene, self._targets, self._epoch, self._looks = scene, targets, epoch, 0
        self._wanted = RECOVERY_PHASES[RECOVERY_PHASES.index(phase) :]

    def found(self) -> Target | None:
        """A worker that can be hit now, None if there is none yet. Raises NoEffect if the recovery is over."""
        for target in self._targets:
            doing = target.doing()
            if doing is not None and doing.phase in self._wanted:
                return target
        self._looks += 1
        if self._looks % _SELDOM == 0 and self._scene.job.epoch > self._epoch:
            raise NoEffect(f"it was over before anybody was seen in {self._wanted[0]} or later")
        return None


def kill_joiner(scene: Scene, effect: Effect) -> None:
    """Kills one worker, and its replacement before that joins."""
    first = scene.target(effect.injection.place)
    before = {pid for host in scene.job.present for pid in host.joiners()}
    _killed(scene, effect, [first])
    effect.proof = None

    def new() -> list[tuple[int, int]]:
        return [(host.number, pid) for host in scene.job.present for pid in host.joiners() if pid not in before and pid != first.pid]

    number, pid = scene.wait("a replacement is started", new, _NEW_S)[0]
    scene.last(0.02 + 0.1 * (effect.injection.place % 4))  # somewhere in its start
    try:
        with held(pid) as descriptor:
            member = any(target.pid == pid for target in scene.job.targets())
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            if not select.select([descriptor], [], [], _DEATH_S)[0]:
                raise NoEffect("the replacement still lives after SIGKILL")
    except ProcessLookupError:
        raise NoEffect("the replacement ended by itself") from None
    joined = next((worker for worker in _activity_pids(scene, number) if worker[1] == pid), (None, pid))[0]
    effect.hits.append(Hit(pid=pid, worker=joined, host=number))
    if member:
        raise NoEffect("the replacement was a member already")
    effect.proof = f"worker {first.worker} was killed, and its replacement (process {pid}) before it joined"


def _activity_pids(scene: Scene, number: int) -> list[tuple[int, int]]:
    """Numbers and processes of a host's workers, from their activity records."""
    host = next(host for host in scene.job.hosts if host.number == number)
    found = []
    with suppress(OSError):
        for name in os.listdir(host.run / "activity"):
            doing = read(host.run, int(name)) if name.isdigit() else None
            if doing is not None:
                found.append((doing.worker, doing.pid))
    return found
