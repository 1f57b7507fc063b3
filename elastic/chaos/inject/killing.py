"""Kills workers by SIGKILL, and waits for their ends."""

from __future__ import annotations

import select
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack

from elastic.chaos.hosts import Target, held
from elastic.chaos.scene import Effect, NoEffect, Scene, Vanished

DEATH_S = 5.0


def killed(scene: Scene, effect: Effect, targets: Sequence[Target]) -> None:
    """Kills workers together, and records what each was doing. Raises Vanished if one had ended before; then none is killed."""
    with ExitStack() as stack:
        try:
            descriptors = [stack.enter_context(held(target.pid)) for target in targets]
        except ProcessLookupError:
            raise Vanished("a victim ended by itself just before") from None
        if any(select.select([descriptor], [], [], 0)[0] for descriptor in descriptors):
            raise Vanished("a victim ended by itself just before")
        hits = [scene.hit(effect, target) for target in targets]
        effect.at = effect.at or time.monotonic()
        for descriptor in descriptors:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        for target, descriptor, hit in zip(targets, descriptors, hits, strict=True):
            if not select.select([descriptor], [], [], DEATH_S)[0]:
                raise NoEffect(f"worker {target.worker} (process {target.pid}) still lives {DEATH_S:g} s after SIGKILL")
            doing = target.doing()
            if doing is not None:
                hit.epoch, hit.step, hit.phase = doing.epoch, doing.step, doing.phase
    names = ", ".join(str(target.worker) for target in targets)
    effect.proof = f"ended by SIGKILL: worker{'s' * (len(targets) > 1)} {names}"


def ended_by_kill(pid: int) -> None:
    """Kills one process, and waits for its end. Raises Vanished if it had ended before, and NoEffect if it does not end."""
    try:
        with held(pid) as descriptor:
            if select.select([descriptor], [], [], 0)[0]:
                raise Vanished(f"process {pid} ended by itself just before")
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            if not select.select([descriptor], [], [], DEATH_S)[0]:
                raise NoEffect(f"process {pid} still lives {DEATH_S:g} s after SIGKILL")
    except ProcessLookupError:
        raise Vanished(f"process {pid} ended by itself just before") from None
