"""The free space of a segment: blocks that were given back, joined where they touch and cut to the sizes that are asked for.

A free block is *warm* while its pages are in memory: using it again costs no page faults. Cold blocks only take address space.
"""

from __future__ import annotations

import bisect
import mmap
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Extent:
    """A mapped run of the segment, of which blocks are taken from the front. Each has a descriptor of its own, so there are few.

    Its first `taken` bytes are or were in blocks; the pages up to `prepared` are in memory already.
    """

    offset: int
    size: int
    memory: mmap.mmap
    taken: int = 0
    prepared: int = 0


@dataclass(slots=True, eq=False)
class Block:
    """`size` bytes of an extent from `start` on, in whole pages."""

    extent: Extent
    start: int
    size: int
    warm: bool = False

    @property
    def offset(self) -> int:
        """Its offset in the segment."""
        return self.extent.offset + self.start


class FreeSpace:
    """The free blocks of a segment; `warm` is how many bytes of them are in memory."""

    def __init__(self) -> None:
        self.warm = 0
        self._blocks: list[Block] = []  # ascending; no two that touch are both warm or both cold

    def give(self, block: Block) -> None:
        """Adds a block that is no longer used."""
        block.warm = True
        self.warm += block.size
        self._insert(block)

    def take(self, size: int, *, warm: bool) -> Block | None:
        """Returns `size` bytes of the smallest block that is large enough, and warm or cold as asked for; None if there is none."""
        found = min((block for block in self._blocks if block.warm == warm and block.size >= size), key=lambda b: b.size, default=None)
        return None if found is None else self._cut(found, size)

    def cool(self, size: int | None = None) -> None:
        """Frees the pages of warm blocks, of `size` bytes (all by default): the largest blocks first, since they fit worst."""
        for block in sorted((block for block in self._blocks if block.warm), key=lambda block: -block.size):
            if size is not None and size <= 0:
                return
            cold = self._cut(block, block.size if size is None else min(size, block.size))
            cold.extent.memory.madvise(mmap.MADV_REMOVE, cold.start, cold.size)
            cold.warm = False
            size = None if size is None else size - cold.size
            self._insert(cold)

    def _cut(self, block: Block, size: int) -> Block:
        """Removes the first `size` bytes of a free block and returns them; the rest stays free."""
        place = self._blocks.index(block)
        if block.size == size:
            del self._blocks[place]
        else:
            self._blocks[place] = Block(block.extent, block.start + size, block.size - size, block.warm)
        self.warm -= size * block.warm
        return Block(block.extent, block.start, size, block.warm)

    def _insert(self, block: Block) -> None:
        place = bisect.bisect(self._blocks, block.offset, key=lambda other: other.offset)
        if place < len(self._blocks) and _touch(block, after := self._blocks[place]):
            block.size += after.size
            del self._blocks[place]
        if place and _touch(before := self._blocks[place - 1], block):
            before.size += block.size
        else:
            self._blocks.insert(place, block)


def _touch(one: Block, other: Block) -> bool:
    """Whether the second block continues the first one, and is warm or cold as it is."""
    return one.extent is other.extent and one.start + one.size == other.start and one.warm == other.warm
