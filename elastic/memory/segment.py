"""Segments: a worker's state in memory that belongs to its host's agent, so that it outlives the worker's process.

A segment is an anonymous file in memory (`memfd`), which has no name in any file system. The agent creates it and gives the descriptor to
the worker, which maps it; when the worker has died, others map it to copy what it held. It ends with its last descriptor.

The first page is the header: *marks* (integers) and the places of *records* (JSON). A process can be killed between any two stores, so
contents are stored before what refers to them: a record gets its number last, and a reader takes the newest record whose checksum is right.
Marks have checksums too: one whose bits have changed says nothing.
Everything behind the header belongs to the allocator of the process that maps the segment as its own.
"""

from __future__ import annotations

import bisect
import json
import mmap
import os
import resource
import struct
import threading
import weakref
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from crc32c import crc32c

from elastic.memory.free_space import Block, Extent, FreeSpace

PAGE = mmap.PAGESIZE
MAGIC = b"elastic1"

MARKS = 8
RECORDS = 7
SLOTS = 2
NONE = -2
"""The value of a mark that says nothing; steps begin at -1."""

_NUMBER = struct.Struct("<q")
_MARK = struct.Struct("<iI")  # value, CRC-32C of the mark's number and the value
_SLOT = struct.Struct("<qqqq")  # number, offset, length, CRC-32C of these three and of the content
_MARKS_AT = 64
_SLOTS_AT = 256
HEADER_BYTES = _SLOTS_AT + RECORDS * SLOTS * _SLOT.size
"""How much of the first page the header takes."""
_POOLED_SHARE = 1 / 4
"""Of the bytes in use: freed memory that is kept for the next change of members, since new pages cost ten times a copy."""
_POOLED_BYTES = 4 << 20
_FIRST_EXTENT = 64 << 20
_WINDOW = 1 << 30  # a reader maps such runs as a whole: each mapping has a descriptor
_SMALL_WINDOW = 64 << 20  # where address space is limited
_RECORD_BYTES = 1 << 28  # a longer record is none: its header was overwritten
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE (Linux 5.14), which Python's mmap does not name
_PREPARED_AT_ONCE = 1 << 20
_ADDRESSES = 64  # times the memory of the machine: blocks of different sizes are not joined


def create() -> int:
    """Creates an empty segment and returns its descriptor. It takes memory only where it is written to.

    Raises:
        OSError: if this system has no anonymous files in memory, or limits the size of files.
    """
    if not hasattr(os, "memfd_create"):
        raise OSError("this system has no anonymous files in memory (memfd)")
    descriptor = os.memfd_create("elastic-segment", os.MFD_CLOEXEC)
    try:
        # Its end is never moved again: a worker may limit the size of its files later, and a limit would apply to that.
        os.ftruncate(descriptor, _ADDRESSES * os.sysconf("SC_PHYS_PAGES") * PAGE)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


class Header:
    """Marks and records of a segment, in the order of its stores: another process may read between any two."""

    def __init__(self, page: np.ndarray) -> None:
        self._page = page

    def _write(self, offset: int, content: bytes) -> None:
        self._page[offset : offset + len(content)] = np.frombuffer(content, dtype=np.uint8)

    def begin(self) -> None:
        """Writes an empty header."""
        for mark in range(MARKS):
            self.set_mark(mark, NONE)
        self._write(0, MAGIC)

    @property
    def begun(self) -> bool:
        """Whether the header has been written."""
        return self._page[: len(MAGIC)].tobytes() == MAGIC

    def mark(self, number: int) -> int:
        """Returns a mark; NONE if it is damaged, since what it says could be wrong."""
        value, checksum = _MARK.unpack_from(self._page.data, _MARKS_AT + number * _MARK.size)
        return value if checksum == _mark_checksum(number, value) else NONE

    def set_mark(self, number: int, value: int) -> None:
        """Sets a mark, in one store of 8 bytes."""
        self._write(_MARKS_AT + number * _MARK.size, _MARK.pack(value, _mark_checksum(number, value)))

    def slot(self, record: int, slot: int) -> tuple[int, int, int, int]:
        """Returns a slot's number (0: empty), and the offset, length and checksum of its content."""
        return _SLOT.unpack_from(self._page.data, _slot_at(record, slot))

    def empty_slot(self, record: int, slot: int) -> None:
        """Empties a slot; called before its content is overwritten."""
        self._write(_slot_at(record, slot), _NUMBER.pack(0))

    def fill_slot(self, record: int, slot: int, number: int, offset: int, length: int, checksum: int) -> None:
        """Fills a slot whose content is in place: its number is stored last."""
        at = _slot_at(record, slot)
        self._write(at + _NUMBER.size, _SLOT.pack(number, offset, length, checksum)[_NUMBER.size :])
        self._write(at, _NUMBER.pack(number))


def _mark_checksum(number: int, value: int) -> int:
    return crc32c(struct.pack("<ii", number, value))


def _slot_checksum(record: int, slot: int, number: int, offset: int, data: bytes) -> int:
    """Returns the checksum of a slot and of its content, so that a slot that was damaged, or stands elsewhere, is none."""
    return crc32c(data, crc32c(struct.pack("<iiqqq", record, slot, number, offset, len(data))))


def _slot_at(record: int, slot: int) -> int:
    return _SLOTS_AT + (record * SLOTS + slot) * _SLOT.size


class OwnSegment:
    """A segment mapped by the worker whose state lies in it. One thread allocates; memory returns when its last view is dropped.

    With `keeps`, freed memory is kept for later allocations until `trim`, but none is added to it.
    """

    def __init__(self, fd: int) -> None:
        """Takes over the descriptor of an empty segment. Raises OSError if it cannot be mapped."""
        self._fd, self._capacity = fd, os.fstat(fd).st_size
        self._extents: list[Extent] = []
        self._page = mmap.mmap(fd, PAGE)
        self.header = Header(np.frombuffer(self._page, dtype=np.uint8))
        self._free = FreeSpace()
        self._returned: deque[Block] = deque()
        self._addresses: list[int] = []
        self._blocks: list[Block] = []
        self._records: dict[tuple[int, int], np.ndarray] = {}
        self.used = 0
        self.keeps = False
        self._lock = threading.Lock()  # of `_extents`
        self.header.begin()

    def allocate(self, size: int) -> np.ndarray:
        """Returns `size` zero bytes (uint8), page-aligned. Raises MemoryError if the segment is full."""
        rounded = _rounded(size)
        self.collect()
        block = self._free.take(rounded, warm=True)
        if block is None and not (self._extents and self._extents[-1].prepared >= self._extents[-1].taken + rounded):
            if self.keeps:
                self._make_room(rounded)
            block = self._free.take(rounded, warm=False)
        block = block or self._grown(rounded)
        clear = block.warm
        self.used += rounded
        # Its base is no array: NumPy would make views of it refer to that one, and the block would seem to be dropped.
        memory = np.frombuffer(memoryview(block.extent.memory)[block.start : block.start + rounded], dtype=np.uint8)
        weakref.finalize(memory, self._returned.append, block).atexit = False
        place = bisect.bisect(self._addresses, memory.ctypes.data)
        self._addresses.insert(place, memory.ctypes.data)
        self._blocks.insert(place, block)
        found = memory[:size]
        if clear:
            found[:] = 0
        return found

    def prepare(self, size: int) -> None:
        """Puts `size` bytes that are not in use into memory, so that their first use costs no page faults. Any thread may call it.

        It is only a preparation: without memory, or on a system that cannot do it, less is prepared.
        """
        with suppress(MemoryError):
            with self._lock:
                extent = self._room_for(size)
                start, stop = max(extent.taken, extent.prepared), min(extent.taken + size, extent.size)
            with suppress(OSError):
                for at in range(start, stop, _PREPARED_AT_ONCE):
                    end = min(at + _PREPARED_AT_ONCE, stop)
                    extent.memory.madvise(_POPULATE_WRITE, at, end - at)  # the owner may write to these pages at the same time
                    extent.prepared = end

    @property
    def pooled(self) -> int:
        """Bytes that are not in use, whose pages are kept in memory."""
        return self._free.warm

    @property
    def prepared(self) -> int:
        """Bytes that were prepared and are not in use yet."""
        return sum(max(0, extent.prepared - extent.taken) for extent in self._extents)

    def _grown(self, size: int) -> Block:
        with self._lock:
            extent = self._room_for(size)
            extent.taken += size
        return Block(extent, extent.taken - size, size)

    def _room_for(self, size: int) -> Extent:
        extent = self._extents[-1] if self._extents else None
        return self._mapped(size) if extent is None or extent.size - extent.taken < size else extent

    def _mapped(self, size: int) -> Extent:
        """Maps more of the segment, at least `size` bytes: as much again as is mapped already."""
        last = self._extents[-1] if self._extents else None
        offset = PAGE if last is None else last.offset + last.size
        size = max(size, _FIRST_EXTENT, offset)
        if offset + size > self._capacity:
            raise MemoryError(f"a worker's segment of {self._capacity} bytes has no room for {size} bytes behind {offset}")
        try:
            memory = mmap.mmap(self._fd, size, offset=offset)
        except OSError as error:
            raise MemoryError(f"{size} bytes of a worker's segment cannot be mapped: {error}") from error
        self._extents.append(Extent(offset, size, memory))
        return self._extents[-1]

    def collect(self) -> None:
        """Takes back the memory whose last view was dropped: keeps a little for the next allocations, and frees the pages of the rest."""
        while self._returned:
            block = self._returned.popleft()
            place = self._blocks.index(block)
            del self._blocks[place], self._addresses[place]
            self.used -= block.size
            self._free.give(block)
            if not self.keeps and self._pools_too_much:
                self._free.cool()

    @property
    def _pools_too_much(self) -> bool:
        return self.pooled > max(_POOLED_BYTES, _POOLED_SHARE * self.used)

    def trim(self) -> None:
        """Frees the pages of memory that was kept or prepared for later allocations, unless it is only a little."""
        self.keeps = False
        self.collect()
        if self._pools_too_much:
            self._free.cool()
        if self.prepared > _POOLED_BYTES:
            for extent in self._extents:
                if extent.prepared > extent.taken:
                    extent.memory.madvise(mmap.MADV_REMOVE, extent.taken, extent.prepared - extent.taken)
                    extent.prepared = extent.taken

    def _make_room(self, size: int) -> None:
        """Frees as many warm pages as are about to be used, if too many are kept."""
        if self._pools_too_much:
            self._free.cool(size)

    def offset_of(self, address: int) -> int | None:
        """Returns the offset in the segment of memory at an address; None if it lies elsewhere."""
        block, shift = self.block_at(address)
        return address + shift if address in block else None

    def block_at(self, address: int) -> tuple[range, int]:
        """Returns the addresses of the block in which an address lies, and what is added to them to get offsets; else an empty range."""
        place = bisect.bisect(self._addresses, address) - 1
        if place < 0 or address >= self._addresses[place] + self._blocks[place].size:
            return range(0), 0
        begin, block = self._addresses[place], self._blocks[place]
        return range(begin, begin + block.size), block.offset - begin

    def write_record(self, record: int, slot: int, number: int, content: Any) -> None:
        """Writes JSON into a slot of a record, with a number above 0; what was in that slot is lost."""
        data = json.dumps(content, separators=(",", ":")).encode()
        self.collect()  # most memory is freed some steps after the last allocation
        self.header.empty_slot(record, slot)
        memory = self._records.get((record, slot))
        if memory is None or memory.size < len(data):
            memory = self._records[record, slot] = self.allocate(2 * len(data))
        memory[: len(data)] = np.frombuffer(data, dtype=np.uint8)
        offset = self.offset_of(memory.ctypes.data)
        assert offset is not None  # it was allocated here
        self.header.fill_slot(record, slot, number, offset, len(data), _slot_checksum(record, slot, number, offset, data))


def _rounded(size: int) -> int:
    """Returns the size of the block for `size` bytes: one of eight between two powers of two, so that freed blocks fit again."""
    step = max(PAGE, 1 << max(0, size.bit_length() - 4))
    return max(PAGE, -(-size // step) * step)


class MappedSegment:
    """Another worker's segment, mapped to read what is in it."""

    def __init__(self, fd: int) -> None:
        """Takes over the descriptor. Raises OSError if it cannot be mapped."""
        self._fd = fd
        self.size = os.fstat(fd).st_size
        self._maps: dict[tuple[int, int, int], mmap.mmap] = {}
        self._run = _WINDOW if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY else _SMALL_WINDOW
        self.header = None if self.size < PAGE else Header(self.bytes_at(0, PAGE))

    def close(self) -> None:
        """Closes the descriptor; memory that is still viewed stays mapped."""
        self._maps.clear()
        os.close(self._fd)

    def bytes_at(self, offset: int, size: int) -> np.ndarray:
        """Returns a run of the segment, read-only. Raises ValueError if it is not inside."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise ValueError(f"bytes {offset} to {offset + size} are not inside a segment of {self.size} bytes")
        if not size:
            return np.empty(0, dtype=np.uint8)
        return self._window(offset, size, mmap.ACCESS_READ)

    def _window(self, offset: int, size: int, access: int) -> np.ndarray:
        start = offset - offset % self._run
        stop = min(-(-(offset + size) // self._run) * self._run, self.size)
        mapped = self._maps.get((start, stop, access))
        if mapped is None:
            mapped = self._maps[start, stop, access] = mmap.mmap(self._fd, stop - start, access=access, offset=start)
        return np.frombuffer(memoryview(mapped)[offset - start : offset - start + size], dtype=np.uint8)

    def private_bytes(self, offset: int, size: int) -> np.ndarray:
        """Returns a run of the segment that can be written to without changing it. Raises ValueError if it is not inside."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise ValueError(f"bytes {offset} to {offset + size} are not inside a segment of {self.size} bytes")
        return self._window(offset, size, mmap.ACCESS_COPY)

    def record(self, record: int, slot: int) -> tuple[int, Any] | None:
        """Returns the number and the content of a slot; None if it is empty or incomplete."""
        if self.header is None or not self.header.begun:
            return None
        number, offset, length, checksum = self.header.slot(record, slot)
        if number <= 0 or length > _RECORD_BYTES:
            return None
        try:
            data = self.bytes_at(offset, length).tobytes()
            return (number, json.loads(data)) if _slot_checksum(record, slot, number, offset, data) == checksum else None
        except ValueError:
            return None

    def newest(self, record: int) -> Any:
        """Returns the content of a record's slot with the highest number; None if both are empty."""
        found = [each for slot in range(SLOTS) if (each := self.record(record, slot)) is not None]
        return max(found, key=lambda each: each[0])[1] if found else None

    def mark(self, number: int) -> int:
        """Returns a mark, NONE if there is no header."""
        return NONE if self.header is None or not self.header.begun else self.header.mark(number)


def records_by_number(segment: MappedSegment, record: int) -> Mapping[int, Any]:
    """Returns the contents of a record's slots by their numbers."""
    return dict(each for slot in range(SLOTS) if (each := segment.record(record, slot)) is not None)
