"""The digest of all parameters of a view: members send their bytes to the coordinator, in few rounds of bounded size."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from elastic.comm.rounds import Rounds

ROUND_BYTES = 16 << 20
"""Largest size of a round, unless one parameter is larger."""


def batches(sizes: Mapping[str, int], most: int = ROUND_BYTES) -> Iterator[list[str]]:
    """Yields the names in their order, in runs of at most `most` bytes together, or of one name."""
    batch: list[str] = []
    total = 0
    for name, size in sizes.items():
        if batch and total + size > most:
            yield batch
            batch, total = [], 0
        batch.append(name)
        total += size
    if batch:
        yield batch


def digest(
    rounds: Rounds,
    sequence: Callable[[], int],
    worker: int,
    sizes: Mapping[str, int],
    holders: Mapping[str, int],
    bytes_of: Callable[[str], np.ndarray],
    appended: Sequence[np.ndarray] = (),
) -> str:
    """Returns the hex SHA-256 over the bytes of all parameters, in the order of `sizes` (bytes by name), on every member. All must call it.

    `holders` names the worker that sends each parameter's bytes, which are `bytes_of` it there; `sequence` numbers the rounds. The arrays
    in `appended`, which every member has, are digested last.
    """
    total = hashlib.sha256()
    for names in batches(sizes):
        mine = {name: bytes_of(name) for name in names if holders[name] == worker}
        gathered = rounds.gather(sequence(), ({}, mine))
        if gathered is not None:
            for name in names:
                total.update((gathered[holders[name]][1] or {})[name].data)
    for memory in appended:
        total.update(memory.data)
    answer, _ = rounds.commit(sequence(), ({}, None), lambda _: ({"digest": total.hexdigest()}, None))
    return answer["digest"]
