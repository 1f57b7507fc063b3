"""Tests that block digests detect every change, and that several writers can compute them in pieces."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.checkpoint.blocks import (
    BLOCK_BYTES,
    DIGITS,
    block_count,
    block_digests,
    checksums,
    checksums_of,
    combined,
    contributions,
    file_digest,
)

few = settings(max_examples=25, deadline=None)
SIZES = [1, 7, 8, 12, 8192, 8193, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES, 3 * BLOCK_BYTES + 77]


def memory(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def whole(data: np.ndarray) -> str:
    return block_digests(checksums(data))


def by_definition(data: bytes) -> str:
    """As the document says it, bit by bit, a byte's eight of them at a time."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    digests = ""
    for start in range(0, len(data), BLOCK_BYTES):
        register = 0xFFFFFFFF
        for byte in data[start : start + BLOCK_BYTES]:
            register = register >> 8 ^ table[(register ^ byte) & 0xFF]
        digests += f"{register ^ 0xFFFFFFFF:08x}"
    return digests


@pytest.mark.parametrize("size", SIZES)
def test_digests_are_what_the_document_says(size: int) -> None:
    data = memory(size)
    assert whole(data) == by_definition(data.tobytes())
    assert len(whole(data)) == DIGITS * block_count(size)


@pytest.mark.parametrize(
    ("data", "digest"),
    [
        (bytes(32), "8a9136aa"),
        (bytes([0xFF] * 32), "62a8ab43"),
        (bytes(range(32)), "46dd794e"),
        (bytes(range(31, -1, -1)), "113fdb5c"),
        (b"123456789", "e3069283"),
    ],
)
def test_digests_are_those_of_rfc_3720(data: bytes, digest: str) -> None:
    """Appendix B.4, as integers (there the bytes of the CRC are listed in the order of the wire); the last is the usual check value."""
    assert whole(np.frombuffer(data, dtype=np.uint8)) == digest


@given(st.sampled_from(SIZES), st.data())
@few
def test_pieces_add_up_to_the_whole(size: int, data: st.DataObject) -> None:
    values = memory(size)
    if data.draw(st.booleans(), label="zeros that nobody writes"):
        first, last = sorted(data.draw(st.integers(0, size)) for _ in "ab")
        values[first:last] = 0
    else:
        first = last = 0
    cuts = sorted({0, size, first, last, *data.draw(st.lists(st.integers(0, size), max_size=5))})
    total = np.zeros(block_count(size), dtype=np.uint32)
    for start, stop in pairwise(cuts):
        if not first <= start < last:
            begin, sums = contributions(values[start:stop], start, size)
            total[begin : begin + len(sums)] ^= sums
    assert block_digests(combined(total, size)) == whole(values)


@given(st.sampled_from(SIZES), st.data())
@few
def test_flipped_bits_are_found(size: int, data: st.DataObject) -> None:
    """Any one, two or three, and any odd number."""
    values = memory(size)
    before = whole(values)
    bits = data.draw(st.lists(st.integers(0, 8 * size - 1), min_size=1, max_size=3, unique=True))
    for bit in bits:
        values[bit // 8] ^= 1 << bit % 8
    assert whole(values) != before


@given(st.integers(0, BLOCK_BYTES - 5), st.binary(min_size=1, max_size=4))
@few
def test_every_change_within_32_bits_is_found(place: int, change: bytes) -> None:
    values = memory(BLOCK_BYTES)
    before = whole(values)
    values[place : place + len(change)] ^= np.frombuffer(change, dtype=np.uint8)
    assert (whole(values) != before) == any(change)


def test_what_was_moved_or_exchanged_is_found() -> None:
    values = memory(BLOCK_BYTES)
    before = whole(values)
    for other in (
        np.roll(values, 1),
        np.roll(values, 4096),
        values[::-1],
        np.concatenate([values[BLOCK_BYTES // 2 :], values[: BLOCK_BYTES // 2]]),
    ):
        assert whole(np.ascontiguousarray(other)) != before


def test_digests_are_read_back() -> None:
    digests = whole(memory(BLOCK_BYTES + 5))
    assert block_digests(checksums_of(digests)) == digests
    with pytest.raises(ValueError, match="8 hex"):
        checksums_of(digests[:-2])
    assert file_digest(5, digests) != file_digest(6, digests)
