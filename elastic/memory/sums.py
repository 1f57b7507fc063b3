"""The digest of host memory (`memory.digest` has the text); without torch, since agents compare digests too."""

from __future__ import annotations

import numpy as np

from elastic.memory.raw import checksum

COLUMNS = 1024
ROW_BYTES = 8 * COLUMNS
SHIFT = 4
MASK = (1 << 64) - 1


def _odd(count: int, seed: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 1 << 64, count, dtype=np.uint64) | np.uint64(1)


WEIGHTS = _odd(COLUMNS, 1)
_STEP = 0x9E3779B97F4A7C15
"""Odd base of the rows' weights: row i has weight `_STEP ** i`."""
_row_weights = np.ones(1, dtype=np.uint64)


def row_weights(count: int) -> np.ndarray:
    """Returns the weights of the first rows."""
    global _row_weights
    if count > len(_row_weights):
        powers = np.full(1 << count.bit_length(), _STEP, dtype=np.uint64)
        powers[0] = 1
        _row_weights = np.multiply.accumulate(powers)
    return _row_weights[:count]


def _sum(memory: np.ndarray, start: int) -> int:
    whole = (memory.size - start) // ROW_BYTES
    total = 0
    if whole:
        words = np.ndarray((whole, COLUMNS), dtype="<u8", buffer=memory.data, offset=start)
        total = int(np.dot(np.einsum("ij,j->i", words, WEIGHTS), row_weights(whole)))
    rest = memory[start + whole * ROW_BYTES :]
    if rest.size:
        tail = np.zeros(-(-rest.size // 8) * 8, dtype=np.uint8)
        tail[: rest.size] = rest
        weights = WEIGHTS[: tail.size // 8] * row_weights(whole + 1)[-1]
        total += int(np.dot(tail.view("<u8"), weights))
    return total & MASK


def digest_of(memory: np.ndarray) -> str:
    """Returns the digest of flat bytes."""
    return combined(memory.size, _sum(memory, 0), _sum(memory, min(SHIFT, memory.size))) if memory.size else combined(0, 0, 0)


def combined(size: int, aligned: int, shifted: int) -> str:
    """Returns the digest of `size` bytes from its two sums."""
    return f"{aligned ^ (size * _STEP & MASK):016x}{shifted:016x}"


def matches(memory: np.ndarray, recorded: str) -> bool:
    """Returns whether flat bytes have the recorded checksum (8 hex digits) or digest (32)."""
    return recorded == (checksum(memory) if len(recorded) == 8 else digest_of(memory))
