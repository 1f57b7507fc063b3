"""Tests segments: where memory is allocated, when it returns, and what a reader finds in records."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.memory import segment, tensors
from elastic.memory.segment import MARKS, NONE, PAGE, RECORDS, SLOTS, MappedSegment, OwnSegment
from elastic.memory.tensors import lasting, lasting_copy, use_segment
from tests.memory.recorded_segment import recorded

MIB = 1 << 20


class Both:
    """A segment, as its worker and as another process maps it."""

    def __init__(self) -> None:
        self.fd = segment.create()
        self.own, self.mapped = OwnSegment(self.fd), MappedSegment(os.dup(self.fd))

    @property
    def resident(self) -> int:
        """Bytes of memory that the segment takes."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        self.mapped.close()
        os.close(self.fd)


@pytest.fixture
def both() -> Iterator[Both]:
    found = Both()
    use_segment(found.own)
    yield found
    use_segment(None)
    found.close()


def test_memory_starts_at_a_page_is_zero_and_lies_in_the_segment(both: Both) -> None:
    for size in (1, 63, PAGE, PAGE + 1, 3 * MIB):
        memory = both.own.allocate(size)
        assert memory.size == size
        assert memory.ctypes.data % PAGE == 0
        assert not memory.any()
        memory[:] = 7
        offset = both.own.offset_of(memory.ctypes.data)
        assert offset is not None
        assert offset >= PAGE
        assert both.own.offset_of(memory.ctypes.data + size - 1) == offset + size - 1
        assert (both.mapped.bytes_at(offset, size) == 7).all()
    assert both.own.offset_of(np.zeros(8).ctypes.data) is None


def test_lasting_tensors_lie_in_the_segment(both: Both) -> None:
    found = [lasting(100, torch.float32), lasting(3, torch.bfloat16), lasting_copy(torch.arange(5.0)), lasting(0, torch.float32)]
    offsets = [both.own.offset_of(tensors.address(tensor)) for tensor in found[:3]]
    assert None not in offsets
    assert both.mapped.bytes_at(offsets[2] or 0, 20).tobytes() == torch.arange(5.0).numpy().tobytes()
    assert [tensor.numel() for tensor in found] == [100, 3, 5, 0]
    use_segment(None)
    assert both.own.offset_of(tensors.address(lasting(100, torch.float32))) is None


def views(memory: np.ndarray) -> dict[str, object]:
    tensor = tensors.of_bytes(memory, torch.float32)
    return {
        "itself": memory,
        "slice": memory[8:16],
        "slice of a slice": memory[8:64][4:8],
        "other dtype": memory.view(np.float64),
        "bytes": memory.data[3:5],
        "tensor": tensor,
        "view of a tensor": tensor[5:9].view(2, 2).t(),
        "detached": torch.nn.Parameter(tensor[1:2]).detach(),
        "bytes of a tensor": tensors.bytes_of(tensor[1:4]),
    }


@pytest.mark.parametrize("last", [*views(np.zeros(64, dtype=np.uint8))])
def test_memory_returns_when_its_last_view_is_dropped_and_is_zero_again(both: Both, last: str) -> None:
    memory = both.own.allocate(PAGE)
    memory[:] = 1
    address = memory.ctypes.data
    view = views(memory)[last]
    del memory
    others = [both.own.allocate(PAGE) for _ in range(3)]
    assert address not in [other.ctypes.data for other in others]
    assert both.own.used == 4 * PAGE
    del view
    again = both.own.allocate(PAGE)
    assert again.ctypes.data == address
    assert not again.any()
    assert both.own.used == 4 * PAGE


def test_dropped_memory_is_given_back_to_the_system_but_for_a_little(both: Both) -> None:
    kept = both.own.allocate(32 * MIB)
    kept[:] = 1
    for _ in range(3):
        dropped = [both.own.allocate(8 * MIB) for _ in range(4)]
        for each in dropped:
            assert not each.any()
            each[:] = 1
        assert both.resident >= 64 * MIB
        del each
        dropped.clear()
        both.own.collect()
        assert both.own.used == 32 * MIB
        assert 0 <= both.own.pooled <= 4 * MIB
        assert both.resident <= both.own.used + both.own.pooled + 2 * PAGE
    assert kept.all()


def test_prepared_memory_is_used_by_the_next_allocations_and_given_back_by_trim(both: Both) -> None:
    both.own.prepare(16 * MIB)
    if not both.own.prepared:
        pytest.skip("this system cannot prepare memory")
    before = both.resident
    assert 16 * MIB == both.own.prepared <= before
    found = both.own.allocate(6 * MIB)
    assert not found.any()
    found[:] = 1
    assert (both.own.prepared, both.resident) == (10 * MIB, before)
    both.own.prepare(8 * MIB)
    assert (both.own.prepared, both.resident) == (10 * MIB, before), "enough is prepared already"
    both.own.trim()
    assert both.own.prepared == 0
    assert both.resident == before - 10 * MIB
    assert found.all()
    assert not both.own.allocate(12 * MIB).any()


def test_prepared_memory_is_used_before_freed_blocks_whose_pages_were_given_back(both: Both) -> None:
    again = both.own.allocate(8 * MIB)
    address = again.ctypes.data
    again[:] = 1
    del again
    both.own.collect()
    both.own.prepare(8 * MIB)
    if not both.own.prepared:
        pytest.skip("this system cannot prepare memory")
    first, second = both.own.allocate(8 * MIB), both.own.allocate(8 * MIB)
    assert both.own.prepared == 0
    assert first.ctypes.data != address
    assert second.ctypes.data == address
    assert not first.any()
    assert not second.any()


def test_memory_for_more_than_fits_is_not_prepared(both: Both) -> None:
    both.own.prepare(1 << 60)
    assert both.own.prepared == 0


def test_freed_memory_is_kept_for_the_next_allocations_but_none_is_added(both: Both) -> None:
    both.own.keeps = True
    dropped = [both.own.allocate(size * MIB) for size in (16, 8, 8, 4)]
    for each in dropped:
        each[:] = 1
    del each
    dropped.clear()
    both.own.collect()
    before = both.resident
    assert both.own.pooled == 36 * MIB
    again = both.own.allocate(8 * MIB)
    assert not again.any()
    assert (both.own.pooled, both.resident) == (28 * MIB, before)
    other = both.own.allocate(10 * MIB)  # freed blocks that touch are one
    other[:] = 1
    assert (both.own.pooled, both.resident) == (18 * MIB, before)
    larger = both.own.allocate(19 * MIB)
    larger[:] = 1
    assert both.own.pooled == 0, "what was too small made room"
    assert both.resident <= before + MIB
    both.own.trim()
    assert both.own.pooled == 0
    assert both.resident <= both.own.used + 2 * PAGE


def test_memory_that_is_dropped_behind_the_last_allocation_returns_with_the_next_record(both: Both) -> None:
    memory = both.own.allocate(64 * MIB)
    memory[:] = 1
    both.own.write_record(0, 0, 1, {})
    assert both.resident >= 64 * MIB
    del memory
    both.own.write_record(0, 1, 2, {})
    assert both.resident <= 4 * PAGE


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 11), st.integers(1, 6 * MIB)), max_size=30))
def test_no_two_blocks_overlap_and_the_figures_are_true(steps: list[tuple[int, int]]) -> None:
    both, held = Both(), dict[int, np.ndarray]()
    for number, (place, size) in enumerate(steps):
        if held.pop(place, None) is None:
            held[place] = both.own.allocate(size)
            assert not held[place].any()
            held[place][:] = number % 255 + 1
    for memory in held.values():
        assert (memory == memory[0]).all()
    both.own.collect()
    offsets = sorted((both.own.offset_of(memory.ctypes.data) or 0, memory.size) for memory in held.values())
    assert all(first + size <= second for (first, size), (second, _) in itertools.pairwise(offsets))
    needed = sum(memory.size for memory in held.values())
    assert needed <= both.own.used <= 1.25 * needed + len(held) * PAGE
    assert both.resident <= both.own.used + both.own.pooled + 2 * PAGE
    both.close()


def test_a_full_segment_is_a_memory_error(both: Both) -> None:
    with pytest.raises(MemoryError, match="has no room for"):
        both.own.allocate(1 << 60)
    assert not both.own.allocate(10).any()


def test_a_header_that_says_nothing(both: Both) -> None:
    empty = MappedSegment(segment.create())
    assert empty.record(0, 0) is None
    assert empty.newest(1) is None
    assert empty.mark(0) == NONE
    empty.close()
    assert [both.mapped.mark(mark) for mark in range(MARKS)] == [NONE] * MARKS
    assert [both.mapped.newest(record) for record in range(RECORDS)] == [None] * RECORDS


def test_a_run_outside_the_segment_cannot_be_read(both: Both) -> None:
    for offset, size in ((-1, 4), (0, -1), (both.mapped.size - 3, 4)):
        with pytest.raises(ValueError, match="are not inside a segment"):
            both.mapped.bytes_at(offset, size)
    assert both.mapped.bytes_at(both.mapped.size, 0).size == 0
    with pytest.raises(ValueError, match="read-only"):
        both.mapped.bytes_at(0, 8)[0] = 1


@pytest.mark.parametrize("slot", [(1, 0, 1 << 38, 0), (1, -5, 10, 0), (1, PAGE, -1, 0), (1, 1 << 62, 8, 0), (-7, 0, 8, 0)])
def test_a_slot_that_was_overwritten_is_no_record(both: Both, slot: tuple[int, int, int, int]) -> None:
    both.own.write_record(0, 0, 1, {"good": 1})
    both.own.header.fill_slot(0, 1, *slot)
    assert both.mapped.record(0, 1) is None
    assert both.mapped.newest(0) == {"good": 1}


def test_a_record_with_one_wrong_byte_is_none(both: Both) -> None:
    both.own.write_record(2, 0, 5, list(range(50)))
    _, offset, length, _ = both.own.header.slot(2, 0)
    os.pwrite(both.fd, b"3", offset + length // 2)
    assert both.mapped.record(2, 0) is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, RECORDS - 1), st.integers(1, 3000)), min_size=1, max_size=12), st.integers(0, 1 << 30))
def test_at_every_moment_a_record_is_its_old_content_or_its_new_one(writes: list[tuple[int, int]], seed: int) -> None:
    """Each record is written to its two slots in turn, with contents of any length."""
    known: dict[int, list[int]] = {}

    def cut(copy: MappedSegment) -> None:
        for record in range(RECORDS):
            found = copy.newest(record)
            right = known.get(record, [None])
            assert (None if found is None else found[0]) in right, record
            assert found is None or found == [found[0]] * len(found)

    with recorded(seed, cut) as both:
        own = both.open()
        numbers = dict.fromkeys(range(RECORDS), 0)
        for record, length in writes:
            last = numbers[record] or None
            numbers[record] += 1
            known[record] = [last, numbers[record]]
            own.write_record(record, numbers[record] % SLOTS, numbers[record], [numbers[record]] * length)
            both.catch_up()
            known[record] = [numbers[record]]
        assert both.cuts > 5 * len(writes)
