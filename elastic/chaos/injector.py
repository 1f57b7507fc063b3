"""Injects the faults of a schedule, each at its moment, in a thread of its own."""

from __future__ import annotations

import threading
import time
import traceback

from elastic.chaos.inject import INJECT
from elastic.chaos.injection import Injection
from elastic.chaos.scene import Effect, JobOver, Missed, NoEffect, Scene, Vanished

_POLL_S, _END_S = 0.02, 60.0
_TRIES, _ANOTHER_S, _AGAIN_S = 5, 0.2, 3.0
_MENDED_S = 5.0
"""After a bit has flipped, a random fault waits so long at most until the job has gone back: until then a copy of the state is wrong, and
who loses another one at the same time may lose both."""


class Injector:
    """Runs until all faults are over, or the job is. `effects` are in the schedule's order."""

    def __init__(self, scene: Scene, injections: tuple[Injection, ...]) -> None:
        self.effects = [Effect(each) for each in injections]
        self._scene = scene
        self._running: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._run, name="elastic-chaos", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether every fault is over."""
        return not self._thread.is_alive() and not any(thread.is_alive() for thread in self._running)

    def close(self) -> None:
        """Waits for what lasts; the job is over."""
        self._scene.over.set()
        deadline = time.monotonic() + _END_S
        for thread in (self._thread, *self._running):
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        waiting = list(self.effects)
        while waiting and not self._scene.over.wait(_POLL_S):
            for effect in [each for each in waiting if self._due(each.injection)]:
                waiting.remove(effect)
                self._running.append(threading.Thread(target=self._inject, args=(effect,), name=f"elastic-chaos-{effect.injection.kind}"))
                self._running[-1].start()

    def _due(self, injection: Injection) -> bool:
        first = self._scene.sampler.first_at
        if first is None:
            return False
        if injection.time is not None:
            return time.monotonic() - first >= injection.time
        step = injection.step or 0
        return self._scene.sampler.step >= (step if injection.phase is None or injection.of.name == "kill-during-recovery" else step - 1)

    def _inject(self, effect: Effect) -> None:
        effect.over = False
        try:
            if effect.injection.settled:
                self._scene.settle()
            if self._scene.job.schedule.drawn:
                self._scene.last_until(lambda: not self._damaged(), _MENDED_S)
            self._until_hit(effect)
            effect.why = None
        except NoEffect as error:
            effect.proof, effect.why, effect.over = None, str(error), isinstance(error, JobOver)
        except Exception:  # the thread's boundary: an unforeseen error makes the verdict unknown, and is reported there
            effect.proof, effect.why = None, f"the harness failed: {traceback.format_exc(limit=-3)}"
        effect.until = time.monotonic()

    def _damaged(self) -> bool:
        """Whether a bit has flipped lately, and the job has not gone back since."""
        flips = [each for each in self.effects if each.injection.kind == "corrupt" and each.at is not None and each.hits]
        now, epoch = time.monotonic(), self._scene.job.epoch
        return any(now - (each.at or now) < _MENDED_S and epoch <= (each.hits[-1].epoch or 0) for each in flips)

    def _until_hit(self, effect: Effect) -> None:
        """Injects it; again if its victim had ended just before, as by another fault, or if it missed its moment."""
        for left in reversed(range(_TRIES)):
            hits = len(effect.hits)
            try:
                INJECT[effect.injection.kind](self._scene, effect)
                return
            except Vanished:
                if not left:
                    raise
                del effect.hits[hits:]  # nothing was done to it
                self._scene.over.wait(_ANOTHER_S)
            except Missed as error:
                effect.missed.append(str(error))
                if not left:
                    raise NoEffect(f"it missed its moment {len(effect.missed)} times; the last time, {error}") from None
                self._go_on()

    def _go_on(self) -> None:
        """Waits until the job trains again: behind a recovery, the next try has one of its own."""
        epoch, step = self._scene.job.epoch, self._scene.sampler.step
        self._scene.last_until(lambda: self._scene.job.epoch > epoch and self._scene.sampler.step > step, _AGAIN_S)
