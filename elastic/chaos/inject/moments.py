"""Catches a worker at the moment that a fault asks for: it is stopped while one looks, so that it is still there when the fault hits."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from elastic.chaos.hosts import Target, held, stat_of
from elastic.chaos.scene import Effect, Scene, Vanished
from elastic.observe.activity import Doing

NEAR_S = 0.0005
OTHERS_STEPS, LATE_STEPS = 5, 20
"""Steps after the one asked for, from which on any member may be hit, and after which a fault does not wait for its phase any longer."""

_STOPS_S, _SELDOM = 0.5, 100


@contextmanager
def standing_still(pid: int) -> Iterator[int]:
    """Stops a process meanwhile, and continues it unless another fault had stopped it before. Yields a descriptor of it.

    Raises Vanished if there is no such process.
    """
    try:
        with held(pid) as descriptor:
            before = stat_of(pid)
            signal.pidfd_send_signal(descriptor, signal.SIGSTOP)
            try:
                deadline = time.monotonic() + _STOPS_S
                while (stat := stat_of(pid)) is not None and stat.state != "T" and time.monotonic() < deadline:
                    time.sleep(0.0002)
                yield descriptor
            finally:
                if before is None or before.state != "T":
                    with suppress(ProcessLookupError):
                        signal.pidfd_send_signal(descriptor, signal.SIGCONT)
    except ProcessLookupError:
        raise Vanished("the victim ended by itself just before") from None


@contextmanager
def caught(target: Target, wanted: Callable[[Doing], bool]) -> Iterator[bool]:
    """Whether a worker is where it is wanted; if so, it stands still there meanwhile. Raises Vanished."""
    doing = target.doing()
    if doing is None or not wanted(doing):
        yield False
        return
    with standing_still(target.pid):
        doing = target.doing()
        yield doing is not None and wanted(doing)


@contextmanager
def at_moment(scene: Scene, effect: Effect) -> Iterator[Target]:
    """Yields the victim of a fault, at once without a phase; else as it stands still in this phase, of this step or the next one seen.

    A layout in which the chosen worker never is in this phase would let the fault wait for ever. So another member is taken after some
    steps, and after more steps the chosen one, whatever it does; the record says so. Raises NoEffect.
    """
    injection = effect.injection
    if injection.phase is None or injection.step is None:
        yield scene.target(injection.place)
        return
    step: int = injection.step
    while True:
        target, late = _found(scene, injection.place, step, injection.phase)
        with caught(target, lambda doing, late=late: late or _there(doing, step, injection.phase)) as there:
            if there:
                doing = target.doing()
                if late and doing is not None and doing.phase != injection.phase:
                    effect.missed.append(f"nobody was seen in {injection.phase} in {LATE_STEPS} steps: it hit {doing.phase}")
                yield target
                return


def _there(doing: Doing, step: int, phase: str | None) -> bool:
    return doing.step >= step and doing.phase == phase


def _found(scene: Scene, place: int, step: int, phase: str) -> tuple[Target, bool]:
    """Waits until a member is in this phase; returns it, and whether it is too late for that."""
    members, looks = list[Target](), 0

    def look() -> tuple[Target, bool] | None:
        nonlocal members, looks
        if looks % _SELDOM == 0:  # others may be members now
            members = scene.job.targets()
        looks += 1
        if not members:
            return None
        chosen = members[place % len(members)]
        return _seen(chosen, members, step, phase)

    return scene.wait(f"a worker is in {phase} of step {step} or later", look, math.inf, NEAR_S)


def _seen(chosen: Target, members: Sequence[Target], step: int, phase: str) -> tuple[Target, bool] | None:
    doing = chosen.doing()
    if doing is not None and _there(doing, step, phase):
        return chosen, False
    if doing is None or doing.step <= step + OTHERS_STEPS:
        return None
    for other in members:
        its = other.doing()
        if its is not None and _there(its, step, phase):
            return other, False
    return (chosen, True) if doing.step > step + LATE_STEPS else None
