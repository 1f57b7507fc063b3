"""A segment whose stores are recorded, and replayed one at a time on a copy: what is found there after a kill between any two stores."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from elastic.memory import segment
from elastic.memory.segment import Header, MappedSegment, OwnSegment

SPAN = 1 << 20  # of the segment, from its start: small segments only
_PIECE = 256


class RecordedSegment:
    """An `OwnSegment`, and a `copy` on which `cut` is called after every store.

    Stores into the header are replayed in their order. Those into the memory behind it, of which only the result is known when the next
    store into the header is made, are replayed in pieces and in random order.
    """

    def __init__(self, seed: int, cut: Callable[[MappedSegment], None], *, most_cuts: int = 3) -> None:
        self._random = np.random.Generator(np.random.PCG64(seed))
        self._cut, self._most = cut, most_cuts
        self._fd, self._copy_fd = segment.create(), segment.create()
        self.copy = MappedSegment(self._copy_fd)
        self._seen = np.zeros(SPAN, dtype=np.uint8)
        self.cuts = 0

    def open(self) -> OwnSegment:
        """Maps the segment as its worker does."""
        return OwnSegment(self._fd)

    def close(self) -> None:
        self.copy.close()
        os.close(self._fd)

    def store(self, offset: int, content: bytes) -> None:
        """Replays what was written behind the header since the last call, and then this store into the header."""
        self.catch_up()
        half = len(content) // 2 if len(content) > 8 else 0  # eight aligned bytes are one store
        for part in (range(half), range(half, len(content))):
            if part:
                os.pwrite(self._copy_fd, content[part.start : part.stop], offset + part.start)
                self._after()
        self._seen[offset : offset + len(content)] = np.frombuffer(content, dtype=np.uint8)

    def catch_up(self) -> None:
        """Replays what was written behind the header."""
        now = np.frombuffer(os.pread(self._fd, SPAN, 0), dtype=np.uint8).copy()
        now[: segment.PAGE] = self._seen[: segment.PAGE]
        changed = np.unique(np.flatnonzero(now != self._seen) // _PIECE)
        self._random.shuffle(changed)
        cuts = {int(place) for place in self._random.integers(0, max(1, len(changed)), self._most)}
        for place, piece in enumerate(changed.tolist()):
            start = piece * _PIECE
            os.pwrite(self._copy_fd, now[start : start + _PIECE].tobytes(), start)
            if place in cuts:
                self._after()
        self._seen = now

    def _after(self) -> None:
        self.cuts += 1
        self._cut(self.copy)


@contextmanager
def recorded(seed: int, cut: Callable[[MappedSegment], None], *, most_cuts: int = 3) -> Iterator[RecordedSegment]:
    """Records the stores of the segment that it gives."""
    made: list[RecordedSegment] = []
    write = Header._write

    def recording(header: Header, offset: int, content: bytes) -> None:
        if made:
            made[0].store(offset, content)
        write(header, offset, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Header, "_write", recording)
        made.append(RecordedSegment(seed, cut, most_cuts=most_cuts))
        try:
            yield made[0]
        finally:
            made[0].close()
