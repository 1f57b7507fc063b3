"""The segments of this host's workers: created here, kept when their worker has died, and described to control."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace

from elastic.agent.supervision import WorkerProcess, own_fault
from elastic.memory import segment
from elastic.memory.raw import checksum
from elastic.memory.segment import MappedSegment
from elastic.memory.sums import matches
from elastic.observe.console import say
from elastic.recovery.inventory import Inventory
from elastic.recovery.offers import BuffersPlace, Contents, Place


class Segments:
    """Owns the descriptors. A segment's memory is freed when `release` is called and no process maps it any more."""

    def __init__(self, *, wanted: bool) -> None:
        self._wanted = wanted
        self._descriptors: dict[int, int] = {}

    def create(self, worker: int) -> int | None:
        """Creates a worker's segment and returns its descriptor, which stays open here; None if there is to be none."""
        if not self._wanted:
            return None
        try:
            descriptor = segment.create()
        except OSError as error:
            self._wanted = False
            say(f"{error}: so workers keep copies of each other's state, and what a worker has in memory is lost with it")
            return None
        self._descriptors[worker] = descriptor
        return descriptor

    def descriptors(self, workers: Iterable[int]) -> dict[int, int]:
        """Returns the descriptors of these workers' segments, without those that have none."""
        return {worker: self._descriptors[worker] for worker in workers if worker in self._descriptors}

    def offer(self, worker: WorkerProcess) -> Inventory | None:
        """Returns an inventory of what a dead worker's segment holds; None if that is nothing.

        A process that ended by its own fault may have written anywhere: only copies that still have their digests are offered, and no
        gradient sums.
        """
        descriptor = self._descriptors.get(worker.number)
        if descriptor is None:
            return None
        mapped = MappedSegment(os.dup(descriptor))
        try:
            contents = Contents.read(mapped)
            if contents is None:
                return None
            places, fault = contents.complete, own_fault(worker)
            if fault:
                places = [place for place in places if _intact(mapped, contents, place)]
                contents = replace(contents, buffers=_intact_buffers(mapped, contents))
            return contents.offered(places, sums=not fault) if places else None
        finally:
            mapped.close()

    def release(self, worker: int) -> None:
        """Closes a segment that is needed no more."""
        descriptor = self._descriptors.pop(worker, None)
        if descriptor is not None:
            os.close(descriptor)


def _intact(mapped: MappedSegment, contents: Contents, place: Place) -> bool:
    """Whether all states of a copy still have the digests that their owner has recorded."""
    digests = contents.digests_of(place)
    if digests is None:
        return False
    elements = place.stop - place.start
    try:
        return all(
            matches(mapped.bytes_at(offset, elements * itemsize), digests[state]) for state, (offset, itemsize) in place.states.items()
        )
    except (KeyError, ValueError):  # the directory itself was overwritten
        return False


def _intact_buffers(mapped: MappedSegment, contents: Contents) -> dict[int, BuffersPlace]:
    """Returns the buffers that still have the checksums that their worker has recorded, by step."""
    return {
        step: place for step, place in contents.buffers.items() if checksum(mapped.bytes_at(place.offset, place.size)) == place.checksum
    }
