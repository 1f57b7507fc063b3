"""Writes one worker's runs of a save to their places in the shared files, and digests them. No tensor is gathered on one worker."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from elastic.checkpoint.blocks import BLOCK_BYTES, contributions
from elastic.checkpoint.plan import FilePlan, StoredTensor, TensorPlace
from elastic.checkpoint.sliced import scatter
from elastic.checkpoint.store import Store, Writable
from elastic.errors import CheckpointError
from elastic.memory.tensors import bytes_of

TensorRun = tuple[str, str, int, torch.Tensor]
"""Name, state, first element in the tensor's row-major order, and the run's values (of any shape)."""

_CHUNK_BYTES = 16 * BLOCK_BYTES
_IN_FLIGHT = 8
_Written = tuple[str, int, int, int, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePart:
    """One worker's part of a file: byte ranges `[start, stop)`, ascending and joined, and their contributions (`sums`) to `blocks`."""

    ranges: tuple[tuple[int, int], ...]
    blocks: tuple[int, ...]
    sums: bytes

    def __post_init__(self) -> None:
        if len(self.sums) != 4 * len(self.blocks):
            raise CheckpointError(f"a receipt has {len(self.sums)} bytes of sums for {len(self.blocks)} blocks")


@dataclass(frozen=True, slots=True, kw_only=True)
class PartReceipt:
    """Lists what one worker wrote, by file name; made after all of it was synced. `scalars`: those of the checkpoint that it has."""

    token: str
    files: Mapping[str, FilePart]
    scalars: Mapping[str, Mapping[str, float | int | bool]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON that is sent to the coordinator."""
        files = {name: [list(map(list, part.ranges)), list(part.blocks), part.sums.hex()] for name, part in self.files.items()}
        return {"token": self.token, "files": files, "scalars": {name: dict(values) for name, values in self.scalars.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PartReceipt:
        """The inverse of `to_json`."""
        files = {
            name: FilePart(ranges=tuple((start, stop) for start, stop in ranges), blocks=tuple(blocks), sums=bytes.fromhex(sums))
            for name, (ranges, blocks, sums) in data["files"].items()
        }
        return cls(token=data["token"], files=files, scalars=data["scalars"])


class PartSums:
    """Collects byte ranges and sums for a receipt."""

    def __init__(self) -> None:
        self._ranges: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self._sums: dict[str, dict[int, np.uint32]] = defaultdict(dict)

    def add(self, file: str, offset: int, size: int, first: int, sums: np.ndarray) -> None:
        """Adds bytes `[offset, offset + size)`, and their contributions to the blocks from `first` on."""
        self._ranges[file].append((offset, offset + size))
        found = self._sums[file]
        for number, each in enumerate(sums, first):
            found[number] = found[number] ^ each if number in found else each

    def receipt(self, token: str) -> PartReceipt:
        """Returns the receipt. Raises CheckpointError if some byte was written twice."""
        files: dict[str, FilePart] = {}
        for name, ranges in self._ranges.items():
            blocks = tuple(sorted(self._sums[name]))
            sums = np.array([self._sums[name][number] for number in blocks], dtype="<u4").tobytes()
            files[name] = FilePart(ranges=joined(ranges, name), blocks=blocks, sums=sums)
        return PartReceipt(token=token, files=files)


def joined(ranges: Iterable[tuple[int, int]], where: str) -> tuple[tuple[int, int], ...]:
    """Returns the ranges in ascending order, adjacent ones joined. Raises CheckpointError if two overlap."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if found and start < found[-1][1]:
            raise CheckpointError(f"{where}: bytes from {start} to {min(stop, found[-1][1])} were written twice")
        if found and start == found[-1][1]:
            start = found.pop()[0]
        found.append((start, stop))
    return tuple(found)


def chunks(plan: FilePlan, runs: Iterable[TensorRun]) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yields `(file, offset, memory)` of at most 4 MiB, cut at multiples of 4 MiB in the file.

    Raises CheckpointError for a run that has no place in the plan.
    """
    for name, state, start, tensor in runs:
        place = plan.places.get((name, state))
        if place is None:
            raise CheckpointError(f"{name!r}, {state!r} is not in the plan of files")
        _check_run(name, state, start, tensor, place)
        if not tensor.numel():
            continue
        for file, offset, memory in _placed(place, start, tensor):
            while memory.size:
                size = min(memory.size, _CHUNK_BYTES - offset % _CHUNK_BYTES)
                yield file, offset, memory[:size]
                memory, offset = memory[size:], offset + size


def _placed(place: StoredTensor, start: int, tensor: torch.Tensor) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yields `(file, offset, memory)` of a run: one, or several for a tensor that is kept as slices."""
    if isinstance(place, TensorPlace):
        yield place.file, place.offset + start * place.spec.itemsize, bytes_of(tensor)
    else:
        yield from scatter(place, start, tensor)


def _check_run(name: str, state: str, start: int, tensor: torch.Tensor, place: StoredTensor) -> None:
    if str(tensor.dtype) != f"torch.{place.spec.dtype}":
        raise CheckpointError(f"{name!r}, {state!r} is {tensor.dtype}, but the contents list it as {place.spec.dtype}")
    if start < 0 or start + tensor.numel() > place.spec.elements:
        raise CheckpointError(f"{name!r}, {state!r}: run [{start}, {start + tensor.numel()}) of {place.spec.elements} elements")


class _PartWriter:
    """Digests and writes pieces. Both release the interpreter's lock, so two threads overlap them."""

    def __init__(self, plan: FilePlan, store: Store, directory: str) -> None:
        self._store, self._directory = store, directory
        self._sizes = {file.name: file.size for file in plan.files}
        self._opened: dict[str, Writable] = {}
        self.sums = PartSums()

    def write(self, pieces: Iterable[tuple[str, int, np.ndarray]], threads: int) -> None:
        with ThreadPoolExecutor(threads, thread_name_prefix="checkpoint-write") as pool:
            waiting: deque[Future[_Written]] = deque()
            try:
                for file, offset, memory in pieces:
                    waiting.append(pool.submit(self._put, self._file(file), file, offset, memory))
                    if len(waiting) >= _IN_FLIGHT:
                        self.sums.add(*waiting.popleft().result())
                while waiting:
                    self.sums.add(*waiting.popleft().result())
            finally:
                for future in waiting:
                    future.cancel()

    def write_alone(self, pieces: Iterable[tuple[str, int, np.ndarray]]) -> None:
        for file, offset, memory in pieces:
            self.sums.add(*self._put(self._file(file), file, offset, memory))

    def _file(self, name: str) -> Writable:
        if name not in self._opened:
            self._opened[name] = self._store.open_write(f"{self._directory}/{name}")
        return self._opened[name]

    def _put(self, opened: Writable, file: str, offset: int, memory: np.ndarray) -> _Written:
        found = contributions(memory, offset, self._sizes[file])
        opened.write(memory, offset)
        return file, offset, memory.size, *found

    def sync(self) -> None:
        for file in self._opened.values():
            file.sync()

    def close(self) -> None:
        """Closes the files. Call it only when no thread writes any more: the system reuses a closed descriptor's number."""
        while self._opened:
            self._opened.popitem()[1].close()


def write_part(plan: FilePlan, store: Store, directory: str, token: str, runs: Iterable[TensorRun], threads: int) -> PartReceipt:
    """Writes and syncs `runs`, and returns the receipt; `commit.write_runs` checks the ticket first."""
    part = _PartWriter(plan, store, directory)
    try:
        pieces = chunks(plan, runs)
        if threads > 1:
            part.write(pieces, threads)
        else:
            part.write_alone(pieces)
        part.sync()
    finally:
        part.close()
    return part.sums.receipt(token)
