"""What one worker does in a save: its own runs go to their places in the shared files, digested on the way. Nothing is gathered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from checkpoint.blocks import BLOCK_BYTES, contributions
from checkpoint.plan import FilePlan, Place
from checkpoint.store import Store, Writable
from elastic.errors import CheckpointError

Run = tuple[str, str, int, torch.Tensor]
"""Name, state, first element in the tensor's row-major order, and the run's values (of any shape)."""

_CHUNK_BYTES = 16 * BLOCK_BYTES
_THREADS = 2
_IN_FLIGHT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePart:
    """What one worker wrote of one file: byte ranges `[start, stop)`, ascending and joined, and what they add to which blocks."""

    ranges: tuple[tuple[int, int], ...]
    blocks: tuple[int, ...]
    sums: bytes

    def __post_init__(self) -> None:
        if len(self.sums) != 16 * len(self.blocks):
            raise CheckpointError(f"a receipt has {len(self.sums)} bytes of sums for {len(self.blocks)} blocks")


@dataclass(frozen=True, slots=True, kw_only=True)
class PartReceipt:
    """By file name. It is made only after what it lists was synced."""

    token: str
    files: Mapping[str, FilePart]

    def to_json(self) -> dict[str, Any]:
        """For the way to the coordinator."""
        files = {name: [list(map(list, part.ranges)), list(part.blocks), part.sums.hex()] for name, part in self.files.items()}
        return {"token": self.token, "files": files}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PartReceipt:
        """The inverse of `to_json`."""
        files = {
            name: FilePart(ranges=tuple((start, stop) for start, stop in ranges), blocks=tuple(blocks), sums=bytes.fromhex(sums))
            for name, (ranges, blocks, sums) in data["files"].items()
        }
        return cls(token=data["token"], files=files)


class PartSums:
    """Collects what goes into a receipt."""

    def __init__(self) -> None:
        self._ranges: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self._sums: dict[str, dict[int, np.ndarray]] = defaultdict(dict)

    def add(self, file: str, offset: int, size: int, first: int, sums: np.ndarray) -> None:
        """Bytes `[offset, offset + size)` and their contributions."""
        self._ranges[file].append((offset, offset + size))
        found = self._sums[file]
        for number, both in enumerate(sums, first):
            found[number] = found[number] + both if number in found else both

    def receipt(self, token: str) -> PartReceipt:
        """Raises CheckpointError if some byte was written twice."""
        files: dict[str, FilePart] = {}
        for name, ranges in self._ranges.items():
            blocks = tuple(sorted(self._sums[name]))
            sums = np.stack([self._sums[name][number] for number in blocks]).astype("<u8").tobytes()
            files[name] = FilePart(ranges=joined(ranges, name), blocks=blocks, sums=sums)
        return PartReceipt(token=token, files=files)


def joined(ranges: Iterable[tuple[int, int]], where: str) -> tuple[tuple[int, int], ...]:
    """Ascending, neighbours joined. Raises CheckpointError if two overlap."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if found and start < found[-1][1]:
            raise CheckpointError(f"{where}: bytes from {start} to {min(stop, found[-1][1])} were written twice")
        if found and start == found[-1][1]:
            start = found.pop()[0]
        found.append((start, stop))
    return tuple(found)


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """Flat uint8 memory of a tensor's values in row-major order; no copy if it lies so in host memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def chunks(plan: FilePlan, runs: Iterable[Run]) -> Iterator[tuple[str, int, np.ndarray]]:
    """`(file, offset, memory)` of at most 4 MiB, cut at multiples of the block. Raises CheckpointError for a run that the plan has no place for."""
    for name, state, start, tensor in runs:
        place = plan.places.get((name, state))
        _check_run(name, state, start, tensor, place)
        if place is None or not tensor.numel():
            continue
        memory = as_bytes(tensor)
        offset = place.offset + start * place.itemsize
        while memory.size:
            size = min(memory.size, _CHUNK_BYTES - offset % _CHUNK_BYTES)
            yield place.file, offset, memory[:size]
            memory, offset = memory[size:], offset + size


def _check_run(name: str, state: str, start: int, tensor: torch.Tensor, place: Place | None) -> None:
    if place is None:
        raise CheckpointError(f"{name!r}, {state!r} is not in the plan of files")
    if str(tensor.dtype) != f"torch.{place.spec.dtype}":
        raise CheckpointError(f"{name!r}, {state!r} is {tensor.dtype}, and was announced as {place.spec.dtype}")
    if start < 0 or start + tensor.numel() > place.elements:
        raise CheckpointError(f"{name!r}, {state!r}: run [{start}, {start + tensor.numel()}) of {place.elements} elements")


def write_part(plan: FilePlan, store: Store, directory: str, token: str, runs: Iterable[Run], threads: int = _THREADS) -> PartReceipt:
    """Writes and syncs `runs`; `commit.write_runs` is what checks the ticket first."""
    sums = PartSums()
    with ExitStack() as stack:
        opened: dict[str, Writable] = {}

        def put(file: str, offset: int, memory: np.ndarray) -> tuple[str, int, int, int, np.ndarray]:
            found = contributions(memory, offset)
            opened[file].write(memory, offset)
            return file, offset, memory.size, *found

        pool = stack.enter_context(_pool(threads))
        waiting: list[Future[tuple[str, int, int, int, np.ndarray]]] = []
        for file, offset, memory in chunks(plan, runs):
            if file not in opened:
                opened[file] = store.open_write(f"{directory}/{file}")
                stack.callback(opened[file].close)
            if pool is None:
                sums.add(*put(file, offset, memory))
                continue
            waiting.append(pool.submit(put, file, offset, memory))
            if len(waiting) >= _IN_FLIGHT:
                sums.add(*waiting.pop(0).result())
        for future in waiting:
            sums.add(*future.result())
        _sync(list(opened.values()))
    return sums.receipt(token)


def _sync(files: Sequence[Writable]) -> None:
    for file in files:
        file.sync()


@contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor | None]:
    """Digesting and writing both release the interpreter's lock, so two threads overlap them."""
    if threads < 2:
        yield None
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="checkpoint-write") as pool:
        yield pool
