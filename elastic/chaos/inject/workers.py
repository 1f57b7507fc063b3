"""Faults of worker processes: signals."""

from __future__ import annotations

import select
import signal
import time
from contextlib import suppress

from elastic.chaos.hosts import held, stat_of
from elastic.chaos.inject.killing import killed
from elastic.chaos.inject.moments import NEAR_S, at_moment
from elastic.chaos.scene import Effect, NoEffect, Scene, Vanished

_PERIOD_S, _ALL_S = 0.1, 20.0


def kill(scene: Scene, effect: Effect) -> None:
    """Kills one worker."""
    with at_moment(scene, effect) as target:
        killed(scene, effect, [target])


def kill_many(scene: Scene, effect: Effect) -> None:
    """Kills several workers of one host at once; it waits until so many are members."""
    count = min(effect.injection.count, scene.job.schedule.job.workers)
    scene.last_until(lambda: any(len(host.targets()) >= count for host in scene.job.present), _ALL_S)
    with at_moment(scene, effect) as first:
        known = first.host.targets()
        places = [target.place for target in known]
        start = places.index(first.place) if first.place in places else 0
        ring = known[start:] + known[:start]
        if len(ring) < count:
            effect.missed.append(f"host {first.host.number} had {len(ring)} members, not {count}, for {_ALL_S:g} s")
        killed(scene, effect, ring[: effect.injection.count])


def stop(scene: Scene, effect: Effect) -> None:
    """Stops one worker, and continues it later if it still lives."""
    try:
        with at_moment(scene, effect) as target, held(target.pid) as descriptor:
            scene.hit(effect, target)
            effect.at = time.monotonic()
            signal.pidfd_send_signal(descriptor, signal.SIGSTOP)
            scene.wait("the process is stopped", lambda: (s := stat_of(target.pid)) is None or s.state == "T", 2.0, NEAR_S)
            if stat_of(target.pid) is None:
                raise Vanished("the victim ended by itself just before")
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
    stopped = 0
    with at_moment(scene, effect) as target:
        pass  # it begins there, and is continued
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
        if stat_of(target.pid) is None:
            raise Vanished("the victim ended by itself just before")
        raise NoEffect("it was never seen stopped")
    effect.proof = f"worker {target.worker} was seen stopped {stopped} times"
