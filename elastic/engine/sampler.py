"""Chooses the samples of a step: a pure function of (seed, step), with O(1) seek.

The i-th sample of a step has the stream index step x batch + i. With a dataset of N samples its data epoch is index // N, and a keyed
permutation of range(N) maps index % N to a sample. The permutation is a four-round Feistel network over the next even number of bits,
cycle-walked back into range (Black & Rogaway 2002, "Ciphers with arbitrary finite domains"). A batch may span two data epochs. The step
number is the only state to save.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

_ROUNDS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Permutation:
    """A keyed bijection of range(size)."""

    size: int
    seed: int
    data_epoch: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a permutation needs at least one element, not {self.size}")

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self.size:
            raise IndexError(f"position {position} is not in range({self.size})")
        half = max(1, ((self.size - 1).bit_length() + 1) // 2)
        value = position
        while True:
            value = self._encrypt(value, half)
            if value < self.size:
                return value

    def _encrypt(self, value: int, half: int) -> int:
        mask = (1 << half) - 1
        left, right = value >> half, value & mask
        for turn in range(_ROUNDS):
            word = hashlib.blake2b(f"{self.seed}/{self.data_epoch}/{turn}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(word, "little") & mask)
        return (left << half) | right


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleIndex:
    """One sample of the stream: its index in the dataset, and the number of the pass over the dataset."""

    index: int
    data_epoch: int


def samples(
    seed: int, step: int, batch_size: int, dataset_size: int, positions: Sequence[int], *, shuffled: bool = True
) -> list[SampleIndex]:
    """Returns the samples at `positions` (0 <= position < batch_size) of a step's global batch; not `shuffled`, in the dataset's order."""
    found = []
    for position in positions:
        data_epoch, offset = divmod(step * batch_size + position, dataset_size)
        index = Permutation(size=dataset_size, seed=seed, data_epoch=data_epoch)[offset] if shuffled else offset
        found.append(SampleIndex(index=index, data_epoch=data_epoch))
    return found
