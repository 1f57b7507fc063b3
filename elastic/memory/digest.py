"""A position-sensitive 128-bit digest of memory, at the speed of memory (8 GB/s on one core; SHA-1 reaches 2).

It is two sums of 64-bit words, each multiplied by an odd weight of its position, modulo 2**64. The second sum starts four bytes later,
since a change of the highest bit of two words would cancel in one sum. It detects swapped, shifted, torn and flipped memory. It does not
resist deliberate collisions; the links' handshake keeps attackers out.
"""

from __future__ import annotations

import numpy as np
import torch

from elastic.memory.tensors import bytes_of

_COLUMNS = 1024
_ROW_BYTES = 8 * _COLUMNS
_SHIFT = 4
_MASK = (1 << 64) - 1


def _odd(count: int, seed: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 1 << 64, count, dtype=np.uint64) | np.uint64(1)


_WEIGHTS = _odd(_COLUMNS, 1)
_STEP = 0x9E3779B97F4A7C15
"""Odd base of the rows' weights: row i has weight `_STEP ** i`."""
_row_weights = np.ones(1, dtype=np.uint64)


def _rows(count: int) -> np.ndarray:
    global _row_weights
    if count > len(_row_weights):
        powers = np.full(1 << count.bit_length(), _STEP, dtype=np.uint64)
        powers[0] = 1
        _row_weights = np.multiply.accumulate(powers)
    return _row_weights[:count]


def _sum(memory: np.ndarray, start: int) -> int:
    whole = (memory.size - start) // _ROW_BYTES
    total = 0
    if whole:
        words = np.ndarray((whole, _COLUMNS), dtype="<u8", buffer=memory.data, offset=start)
        total = int(np.dot(np.einsum("ij,j->i", words, _WEIGHTS), _rows(whole)))
    rest = memory[start + whole * _ROW_BYTES :]
    if rest.size:
        tail = np.zeros(-(-rest.size // 8) * 8, dtype=np.uint8)
        tail[: rest.size] = rest
        weights = _WEIGHTS[: tail.size // 8] * _rows(whole + 1)[-1]
        total += int(np.dot(tail.view("<u8"), weights))
    return total & _MASK


def digest(memory: np.ndarray | torch.Tensor) -> str:
    """Returns 32 hex digits that depend on the contents of contiguous memory and on its length in bytes."""
    flat = bytes_of(memory) if isinstance(memory, torch.Tensor) else memory.reshape(-1).view(np.uint8)
    if not flat.size:
        return "0" * 32
    aligned, shifted = _sum(flat, 0), _sum(flat, min(_SHIFT, flat.size))
    length = flat.size * _STEP & _MASK
    return f"{aligned ^ length:016x}{shifted:016x}"
