"""Tests that the agent offers only gradient sums whose memory is as their worker has recorded it."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from elastic.agent.segments import _intact_sums
from elastic.memory import segment
from elastic.memory.raw import checksum, checksum_of
from elastic.memory.segment import MappedSegment, OwnSegment
from elastic.recovery.inventory import FinishedGrains
from elastic.recovery.offers import SumsPlace

FINISHED = FinishedGrains(step=4, layers=range(2), grains=(0, 1), summed=(0, 1))


@pytest.mark.parametrize("flipped", [None, 0, 4095])
def test_sums_with_one_wrong_byte_are_not_offered(flipped: int | None) -> None:
    descriptor = segment.create()
    own, mapped = OwnSegment(os.dup(descriptor)), MappedSegment(descriptor)
    memory = own.allocate(2 * 4096)
    memory[:] = np.arange(2 * 4096) % 251
    at = own.offset_of(memory.ctypes.data)
    assert at is not None
    known = checksum_of([memory[:100], memory[4096:]])
    nodes = {3: [[1, 0, [at, None, at + 4096], known]]}
    place = SumsPlace(finished=FINISHED, nodes=nodes, sizes={3: [100, 8, 4096]}, leaves=[])
    if flipped is not None:
        memory[4096 + flipped] ^= 4
    contents: Any = SimpleNamespace(sums=SumsPlace.from_json(place.to_json()))
    assert _intact_sums(mapped, contents) is (flipped is None)
    outside: Any = SimpleNamespace(sums=SumsPlace(finished=FINISHED, nodes={3: [[1, 0, [1 << 60], known]]}, sizes={3: [100]}, leaves=[]))
    assert not _intact_sums(mapped, outside)
    assert not _intact_sums(mapped, SimpleNamespace(sums=None))  # pyright: ignore[reportArgumentType]
    mapped.close()


def test_the_checksum_of_several_arrays_is_that_of_their_bytes() -> None:
    memory = np.arange(200, dtype=np.uint8)
    assert checksum_of([memory[:3], memory[3:77], memory[77:]]) == checksum(memory)
