"""Reads our own format: only the blocks that hold the requested values, each checked before any of it is returned."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace

import numpy as np
import torch

from elastic.checkpoint.blocks import BLOCK_BYTES, block_count, checksums, checksums_of
from elastic.checkpoint.files import read_header
from elastic.checkpoint.manifest import MANIFEST, MAX_MANIFEST_BYTES, Manifest, decode
from elastic.checkpoint.plan import Sliced, StoredTensor, TensorKey, index_tables, is_extra_file, stored_name, stored_parts
from elastic.checkpoint.renaming import renamed
from elastic.checkpoint.sliced import gather
from elastic.checkpoint.slices import Slicing
from elastic.checkpoint.state import PARAM, Contents
from elastic.checkpoint.store import ReadableStore, Store, read_all
from elastic.checkpoint.strict_json import loads
from elastic.errors import CheckpointDamaged, CheckpointError
from elastic.memory import raw
from elastic.memory.tensors import Landing, empty

_CHUNK_BYTES = 64 * BLOCK_BYTES
_SHARE_BYTES = 2 * BLOCK_BYTES
_CACHED_BLOCKS = 32


class ElasticSource:
    """One checkpoint directory, as an `elastic.checkpoint.state.Source`. `bytes_read` counts bytes read from files, without the manifest.

    It caches blocks at the ends of runs (8 MiB in all), so runs that are read in the order of the files read each block once.
    """

    format = "elastic"

    def __init__(self, store: Store, directory: str, *, threads: int = 2) -> None:
        """Opens a checkpoint. `threads` threads read and check one large run together.

        Raises CheckpointError if the manifest is missing or damaged, or a file is missing or has another size.
        """
        self._store, self._directory = store, directory
        path = f"{directory}/{MANIFEST}"
        self.manifest: Manifest = decode(read_all(store, path, MAX_MANIFEST_BYTES), store.where(path))
        self._contents: Contents | None = None
        self._stored: Mapping[str, str] = {}
        self.name = directory
        self.bytes_read = 0
        self._on_read: Callable[[int], None] = lambda _bytes: None
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._opened: dict[str, ReadableStore] = {}
        self._sums: dict[str, np.ndarray] = {}
        self._cached: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()
        for name, file in self.manifest.files.items():
            size = store.size(f"{directory}/{name}")
            if size != file.size:
                raise CheckpointError(f"{self._where(name)}: {'missing' if size is None else f'{size} bytes'}; it should have {file.size}")

    @property
    def contents(self) -> Contents:
        """The contents with the extra files, which are read at the first use. Raises CheckpointError if one is damaged."""
        if self._contents is None:
            files = {name: self._bytes(name, 0, file.size) for name, file in self.manifest.files.items() if is_extra_file(name)}
            self._contents = replace(self.listed, files=files)
        return self._contents

    @property
    def listed(self) -> Contents:
        """The contents by the manifest, without the extra files: no file is read."""
        return renamed(self.manifest.contents, {stored: name for name, stored in self._stored.items()})

    def rename(self, names: Mapping[str, str]) -> None:
        """Renames tensors from now on: `names` maps the names in the files to new ones. The manifest keeps the names in the files."""
        self._stored = {name: stored for stored, name in names.items()}
        self._contents = None

    def read(self, name: str, state: str, start: int, stop: int) -> torch.Tensor:
        """Reads the run `[start, stop)` (elements) of one tensor. Raises CheckpointError if it does not exist or is damaged."""
        place = self._run(name, state, start, stop)
        values = empty(stop - start, getattr(torch, place.spec.dtype))
        self._fill_values(place, start, values)
        return values

    def read_into(self, name: str, state: str, start: int, values: torch.Tensor) -> None:
        """Reads a run into `values`: flat contiguous host memory of the tensor's dtype. Raises as `read`; bytes in it may be wrong then."""
        place = self._run(name, state, start, start + values.numel())
        if str(values.dtype) != f"torch.{place.spec.dtype}" or not values.is_contiguous():
            raise CheckpointError(f"{name!r}, {state!r} is {place.spec.dtype}; it cannot be read into {values.dtype}, {values.stride()}")
        self._fill_values(place, start, values)

    def _run(self, name: str, state: str, start: int, stop: int) -> StoredTensor:
        place = self.place(name, state)
        if not 0 <= start <= stop <= place.spec.elements:
            raise CheckpointError(f"{name!r}, {state!r}: run [{start}, {stop}) of {place.spec.elements} elements")
        return place

    def _fill_values(self, place: StoredTensor, start: int, values: torch.Tensor) -> None:
        if isinstance(place, Sliced):
            gather(place, start, values, self._fill)
        elif values.numel():
            landing = Landing(values)
            self._fill(place.file, landing.bytes, place.offset + start * place.spec.itemsize)
            landing.take()

    def place(self, name: str, state: str = PARAM) -> StoredTensor:
        """Returns the place of a tensor, or of the one that it is tied to."""
        stored = self._stored.get(name, name)
        place = self.manifest.places.get((self.manifest.contents.ties.get(stored, stored), state))
        if place is None:
            raise CheckpointError(f"{self._store.where(self._directory)}: it has no {state!r} of {name!r}")
        return place

    @property
    def slicings(self) -> dict[TensorKey, Slicing]:
        """The slicings of the tensors that are kept as slices."""
        return {key: place.slicing for key, place in self.manifest.places.items() if isinstance(place, Sliced)}

    def watch(self, on_read: Callable[[int], None]) -> None:
        """Calls `on_read` with the bytes of each read from now on."""
        self._on_read = on_read

    def close(self) -> None:
        """Closes the files, and stops the threads."""
        while self._opened:
            self._opened.popitem()[1].close()
        self._cached.clear()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def verify(self) -> None:
        """Reads and checks everything. Raises CheckpointError with every problem that it found."""
        if problems := list(self.problems()):
            raise CheckpointError("\n".join(problems))

    def problems(self) -> Iterator[str]:
        """Yields one sentence for each file that is damaged or contradicts the manifest."""
        for name in self.manifest.files:
            try:
                self._verify_file(name)
            except CheckpointError as error:
                yield str(error)

    def _where(self, file: str) -> str:
        return self._store.where(f"{self._directory}/{file}")

    def _verify_file(self, name: str) -> None:
        size = self.manifest.files[name].size
        buffer = raw.empty(min(size, _CHUNK_BYTES))
        for offset in range(0, size, _CHUNK_BYTES):
            self._read_blocks(name, buffer[: size - offset], offset)
        if name.endswith(".safetensors.index.json"):
            self._verify_index(name)
        elif name.endswith(".safetensors"):
            self._verify_header(name)

    def _bytes(self, name: str, offset: int, size: int) -> bytes:
        memory = raw.empty(size)
        self._fill(name, memory, offset)
        return memory.tobytes()

    def _verify_header(self, name: str) -> None:
        header = read_header(lambda offset, size: self._bytes(name, offset, size), self.manifest.files[name].size, self._where(name))
        found = {(entry.name, header.data_start + entry.start, entry.shape, entry.dtype) for entry in header.entries}
        parts = [(key, part) for key, place in self.manifest.places.items() for part in stored_parts(place)]
        listed = {(stored_name(*key), part.offset, part.spec.shape, part.spec.dtype) for key, part in parts if part.file == name}
        if found != listed:
            raise CheckpointError(f"{self._where(name)}: its header and the manifest differ on {min(found ^ listed)[0]!r}")

    def _verify_index(self, name: str) -> None:
        index = loads(self._bytes(name, 0, self.manifest.files[name].size), self._where(name))
        weights = {weight: place.file for weight, place in index_tables(self.manifest.places).get(name, {}).items()}
        if not isinstance(index, dict) or index.get("weight_map") != weights:
            raise CheckpointError(f"{self._where(name)}: it does not list the weights of the manifest")

    def _fill(self, file: str, memory: np.ndarray, offset: int) -> None:
        try:
            self._fill_checked(file, memory, offset)
        except CheckpointError as error:
            raise CheckpointDamaged(str(error)) from error

    def _fill_checked(self, file: str, memory: np.ndarray, offset: int) -> None:
        """Fills `memory` directly with whole blocks, and with parts of the first and the last block from checked, cached copies."""
        stop = offset + memory.size
        position = offset
        while position < stop:
            within = position % BLOCK_BYTES
            end = stop if stop == self.manifest.files[file].size else stop // BLOCK_BYTES * BLOCK_BYTES
            if within or position >= end:
                count = min(BLOCK_BYTES - within, stop - position)
                memory[position - offset :][:count] = self._block(file, position // BLOCK_BYTES)[within : within + count]
            else:
                count = min(_CHUNK_BYTES, end - position)
                self._read_blocks(file, memory[position - offset :][:count], position)
            position += count

    def _block(self, file: str, number: int) -> np.ndarray:
        key = (file, number)
        if key in self._cached:
            self._cached.move_to_end(key)
            return self._cached[key]
        start = number * BLOCK_BYTES
        block = raw.empty(min(BLOCK_BYTES, self.manifest.files[file].size - start))
        self._read_blocks(file, block, start)
        self._cached[key] = block
        while len(self._cached) > _CACHED_BLOCKS:
            self._cached.popitem(last=False)
        return block

    def _read_blocks(self, file: str, memory: np.ndarray, start: int) -> None:
        """Fills memory that begins and ends at block boundaries, and checks it."""
        if not memory.size:
            return
        if file not in self._opened:
            self._opened[file] = self._store.open_read(f"{self._directory}/{file}")
            self._sums[file] = checksums_of(self.manifest.files[file].blocks)
        self.bytes_read += memory.size
        self._on_read(memory.size)
        share = max(_SHARE_BYTES, -(-block_count(memory.size) // self._threads) * BLOCK_BYTES)
        if self._threads > 1 and memory.size > share:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._threads - 1, thread_name_prefix="checkpoint-read")
            others = [
                self._pool.submit(self._read_share, file, memory[place : place + share], start + place)
                for place in range(share, memory.size, share)
            ]
            try:
                self._read_share(file, memory[:share], start)
            finally:
                wait(others)
            for other in others:
                other.result()
        else:
            self._read_share(file, memory, start)

    def _read_share(self, file: str, memory: np.ndarray, start: int) -> None:
        """Reads and checks in pieces of the store's `read_bytes`."""
        for place in range(0, memory.size, self._store.read_bytes):
            piece = memory[place : place + self._store.read_bytes]
            self._opened[file].read_into(piece, start + place)
            self._check(file, piece, start + place)

    def _check(self, file: str, memory: np.ndarray, start: int) -> None:
        first, found = start // BLOCK_BYTES, checksums(memory)
        wrong = np.flatnonzero(found != self._sums[file][first : first + len(found)])
        if wrong.size:
            at = (first + int(wrong[0])) * BLOCK_BYTES
            raise CheckpointError(
                f"{self._where(file)}: damaged: bytes from {at} on (a block of {BLOCK_BYTES}) do not have the digest of the manifest"
            )
