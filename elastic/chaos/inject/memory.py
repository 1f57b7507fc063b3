"""A bit that flips in the memory of a worker: in optimizer state, at rest, in the segment that its agent holds for it."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from elastic.chaos.hosts import Target, held, stat_of
from elastic.chaos.scene import Effect, NoEffect, Scene, Vanished
from elastic.memory.segment import MappedSegment
from elastic.recovery.offers import Contents, Place

_AT_REST = ("forward", "backward")
_TRIES, _NEAR_S = 400, 0.0005


def corrupt(scene: Scene, effect: Effect) -> None:
    """Flips one bit of optimizer state. The worker is stopped for a moment, so that it surely computes, and its state is at rest."""
    target = scene.at_phase(effect)
    scene.wait("it has state of a first step", lambda: (doing := target.doing()) is not None and doing.step >= 2, 30.0)
    generator = random.Random(f"{effect.injection}")
    for _ in range(_TRIES):
        scene.wait("it computes", lambda: (doing := target.doing()) is not None and doing.phase in _AT_REST, 30.0, _NEAR_S)
        try:
            with _standing_still(target):
                doing = target.doing()
                if doing is None or doing.phase not in _AT_REST:
                    continue
                scene.hit(effect, target)
                effect.at = time.monotonic()
                effect.proof = _flip(target, generator)
                return
        except ProcessLookupError:
            raise Vanished("the victim ended by itself just before") from None
    raise NoEffect("the worker was never caught while it computed")


@contextmanager
def _standing_still(target: Target) -> Iterator[None]:
    with held(target.pid) as descriptor:
        signal.pidfd_send_signal(descriptor, signal.SIGSTOP)
        try:
            deadline = time.monotonic() + 0.5
            while (stat := stat_of(target.pid)) is not None and stat.state != "T" and time.monotonic() < deadline:
                time.sleep(0.0002)
            yield
        finally:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGCONT)


def _flip(target: Target, generator: random.Random) -> str:
    """Flips a bit in a state that the worker owns, and returns a sentence about it. Raises NoEffect."""
    for entry in Path(f"/proc/{target.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            if "memfd:elastic-segment" not in os.readlink(entry):
                continue
            descriptor = os.open(entry, os.O_RDWR)
            segment = MappedSegment(os.dup(descriptor))
            try:
                contents = Contents.read(segment, loop=False)
                if contents is not None and contents.directory.worker == target.worker:
                    return _flip_in(descriptor, contents.directory.places, generator)
            finally:
                segment.close()
                os.close(descriptor)
    raise NoEffect("it has no segment with state of its own (a system without memfd, or an optimizer without state)")


def _flip_in(descriptor: int, places: tuple[Place, ...], generator: random.Random) -> str:
    owned = [(place, state) for place in places if place.role == "live" for state in sorted(place.states) if state != "param"]
    if not owned:
        raise NoEffect("its optimizer has no state for each element")
    place, state = generator.choice(owned)
    offset, itemsize = place.states[state]
    element = generator.randrange(place.stop - place.start)
    at = offset + element * itemsize + itemsize - 2  # the highest bits of the fraction
    (old,) = os.pread(descriptor, 1, at)
    os.pwrite(descriptor, bytes([old ^ 0x40]), at)
    (new,) = os.pread(descriptor, 1, at)
    if new == old:
        raise NoEffect("the byte did not change")
    return f"a byte of {state} of layer {place.layer}, element {place.start + element}, changed from {old:#04x} to {new:#04x}"
