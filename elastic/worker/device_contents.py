"""What a worker that computes on a device keeps in its segment: the host's copies of its shards, of the last two steps.

The copies of even steps are described as owned shards, those of odd steps as previous copies: each has a mark of its own, so that a step
changes nothing but marks and the records of scalars. Parameters, replicas and gradient sums lie on the device, and are not in the segment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from elastic.engine.shard import Scalars, Shard
from elastic.memory.segment import NONE
from elastic.plan.workload import Workload
from elastic.recovery import offers
from elastic.snapshot.held_copies import Held, StoredCopy
from elastic.worker.segment_contents import CopyRun, Digests, SegmentContents, addresses, by_copy, plain

_MARKS: tuple[Callable[[int], int], Callable[[int], int]] = (offers.live_mark, offers.previous_mark)


class DeviceContents(SegmentContents):
    """The contents of the segment of a worker whose shards lie on a device."""

    _first: Sequence[Held] = ()
    _copies: tuple[Sequence[Held], Sequence[Held]] = ((), ())  # of even and odd steps
    _steps_of: tuple[int, int] = (NONE, NONE)

    def starts_with(self, held: Sequence[Held] | None) -> None:
        """Notes the host's copy of the state with which the next view begins; `prepared` or `begin` follows."""
        self._first = held or ()

    def _set_copy(self, step: int, held: Sequence[Held], complete: int) -> None:
        odd = step % 2
        self._copies = (self._copies[0], held) if odd else (held, self._copies[1])
        self._steps_of = (self._steps_of[0], complete) if odd else (complete, self._steps_of[1])

    def begin(self, step: int, retained: Sequence[StoredCopy], digests: Digests, workload: Workload) -> None:
        """Describes the state with which a view begins, of which the host has the first copy."""
        self._copies, self._steps_of = ((), ()), (NONE, NONE)
        self._set_copy(step, self._first, step)
        super().begin(step, retained, digests, workload)

    def prepared(self, step: int, owned: Sequence[Shard], kept: Sequence[Shard], scalars: Scalars) -> None:
        """Notes the host's copy of the state with which the next view begins if it is committed."""
        memory = {(held.layer, held.start): dict(held.memory) for held in self._first}
        super().prepared(step, [replace(s, memory=memory[s.layer, s.interval.start]) for s in owned], kept, scalars)

    def _own_runs(self) -> list[CopyRun]:
        even, odd = self._copies
        live: list[CopyRun] = [("live", held.layer, held.start, held.memory, None) for held in even]
        return live + [("previous", held.layer, held.start, held.memory, None) for held in odd]

    def _describe(self) -> None:
        self._live_step, self._previous_step = self._steps_of
        super()._describe()

    def overwrites_copy(self, step: int) -> None:
        """Notes that the copy two steps before `step` is about to be overwritten."""
        if self._segment is not None:
            self._set_copy(step, self._copies[step % 2], NONE)
            self._set(_MARKS[step % 2], NONE)

    def has_copy(self, step: int, held: Sequence[Held]) -> None:
        """Notes that the host's copy of the shards as of `step` is complete."""
        if self._segment is None:
            return
        self._set_copy(step, held, step)
        if addresses(self._own_runs()) != self._own_places:  # the first copy in this memory
            self._describe()
            return
        self._write(offers.SCALARS, step, self._scalars[step])
        self._set(_MARKS[step % 2], step)

    def updates(self) -> None:
        """Does nothing: an update changes memory of the device only."""

    def updated(self, step: int) -> None:
        """Notes the scalars of the shards as of `step`; their copy follows."""
        if self._segment is None:
            return
        self._scalars = {known: values for known, values in self._scalars.items() if known in self._steps_of}
        self._scalars[step] = plain(self._optimizer.owned)
        self._settle_memory()

    def digested(self, step: int, digests: Digests) -> None:
        """Notes digests of owned shards as of `step`, which their copy has too, or of replicas."""
        if self._segment is not None and digests:
            self._digests = {known: values for known, values in self._digests.items() if known in (step, *self._steps_of)}
            self._digests[step] = {**self._digests.get(step, {}), **by_copy(digests)}
            self._write(offers.DIGESTS, step, self._digests[step])
