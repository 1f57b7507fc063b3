"""A bit that flips in the memory of a worker: in optimizer state, at rest, in the segment that its agent holds for it."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from elastic.chaos.hosts import Target, stat_of
from elastic.chaos.inject.moments import NEAR_S, caught
from elastic.chaos.kinds import AT_REST
from elastic.chaos.scene import Effect, JobOver, NoEffect, Scene, Vanished
from elastic.memory.segment import MappedSegment
from elastic.observe.activity import Doing
from elastic.recovery.offers import Contents, Place

_TRIES, _EACH, _COMPUTES_S, _ANOTHER_S = 50, 5, 5.0, 0.1
_FIRST = 2  # the first step in which there is state of a step before


def corrupt(scene: Scene, effect: Effect) -> None:
    """Flips one bit of optimizer state. The worker is stopped for a moment, so that it surely computes, and its state is at rest.

    A worker may have no state of its own, as one that has just joined: then it is tried again, and then it is another one's turn.
    """
    injection, generator = effect.injection, random.Random(f"{effect.injection}")
    phases = AT_REST if injection.phase is None else (injection.phase,)
    first = _FIRST if injection.phase is None else max(_FIRST, injection.step or 0)

    def at_rest(doing: Doing) -> bool:
        return doing.phase in phases and doing.step >= first

    scene.wait("optimizer state of a first step", lambda: scene.sampler.step >= first, math.inf)
    why = "no worker was caught while it computed"
    for turn in range(_TRIES):
        target = scene.target(injection.place + turn // _EACH)
        scene.last_until(lambda target=target: _is(target, at_rest) or stat_of(target.pid) is None, _COMPUTES_S, NEAR_S)
        if scene.over.is_set():
            raise JobOver(f"the job ended before it was so far: {why}")
        try:
            with caught(target, at_rest) as there:
                if there:
                    effect.proof = _flip(target, generator)
                    effect.at = time.monotonic()
                    scene.hit(effect, target)
                    return
        except Vanished:
            continue
        except NoEffect as error:
            why = str(error)
            scene.over.wait(_ANOTHER_S)
    raise NoEffect(why)


def _is(target: Target, wanted: Callable[[Doing], bool]) -> bool:
    doing = target.doing()
    return doing is not None and wanted(doing)


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
