"""Block digests find every change, and can be made in pieces by several writers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.blocks import BLOCK_BYTES, COLUMN_WEIGHTS, ROW_WEIGHTS, block_count, block_digests, contributions, file_digest, sums_of

MASK = (1 << 64) - 1
WEIGHTS = [int(row) * int(column) & MASK for row in ROW_WEIGHTS for column in COLUMN_WEIGHTS]
few = settings(max_examples=25, deadline=None)
SIZES = [1, 7, 8, 12, 8192, 8193, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES, 3 * BLOCK_BYTES + 77]


def memory(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def whole(data: np.ndarray) -> str:
    return block_digests(contributions(data, 0)[1])


def by_definition(data: bytes) -> str:
    """As the document says it, word by word."""
    digests = ""
    for start in range(0, len(data), BLOCK_BYTES):
        block = data[start : start + BLOCK_BYTES]
        for shift in (0, 4):
            words = (block[place : place + 8] for place in range(shift, len(block), 8))
            total = sum(int.from_bytes(word, "little") * WEIGHTS[number] for number, word in enumerate(words)) & MASK
            digests += f"{total:016x}"
    return digests


@pytest.mark.parametrize("size", SIZES)
def test_digests_are_what_the_document_says(size: int) -> None:
    data = memory(size)
    assert whole(data) == by_definition(data.tobytes())
    assert len(whole(data)) == 32 * block_count(size)


def test_weights_are_part_of_the_format() -> None:
    assert [f"{int(weight):016x}" for weight in (*COLUMN_WEIGHTS[:3], COLUMN_WEIGHTS[-1], *ROW_WEIGHTS[:3])] == [
        "e220a8397b1dcdaf",
        "6e789e6aa1b965f5",
        "06c45d188009454f",
        f"{int(COLUMN_WEIGHTS[-1]):016x}",
        "0000000000000001",
        "9e3779b97f4a7c15",
        f"{0x9E3779B97F4A7C15**2 & MASK:016x}",
    ]


@given(st.sampled_from(SIZES), st.data())
@few
def test_pieces_add_up_to_the_whole(size: int, data: st.DataObject) -> None:
    values = memory(size)
    cuts = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=5))})
    total = np.zeros((block_count(size), 2), dtype=np.uint64)
    for start, stop in pairwise(cuts):
        first, sums = contributions(values[start:stop], start)
        total[first : first + len(sums)] += sums
    assert block_digests(total) == whole(values)


@given(st.sampled_from(SIZES), st.data())
@few
def test_one_or_two_flipped_bits_are_found(size: int, data: st.DataObject) -> None:
    values = memory(size)
    before = whole(values)
    bits = data.draw(st.lists(st.integers(0, 8 * size - 1), min_size=1, max_size=2, unique=True))
    for bit in bits:
        values[bit // 8] ^= 1 << bit % 8
    assert whole(values) != before


@pytest.mark.parametrize("places", [(7, 15), (BLOCK_BYTES - 1, 7), (BLOCK_BYTES - 1, BLOCK_BYTES - 9), (3, 11), (3, BLOCK_BYTES - 1)])
def test_two_flipped_signs_are_found(places: tuple[int, int]) -> None:
    values = memory(BLOCK_BYTES)
    before = whole(values)
    for place in places:
        values[place] ^= 0x80
    assert whole(values) != before


def test_digests_are_read_back() -> None:
    digests = whole(memory(BLOCK_BYTES + 5))
    assert block_digests(sums_of(digests)) == digests
    with pytest.raises(ValueError, match="32 hex"):
        sums_of(digests[:-2])
    assert file_digest(5, digests) != file_digest(6, digests)
