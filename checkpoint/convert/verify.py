"""Reads everything of a checkpoint, and reports what that proves."""

from __future__ import annotations

from collections.abc import Callable

from elastic.checkpoint.convert.output import silent_bytes
from elastic.checkpoint.convert.rule_source import Ruled
from elastic.checkpoint.state import Source


def size_of(source: Source) -> int:
    """Returns the bytes of all tensors."""
    return sum(spec.bytes for states in source.contents.tensors.values() for spec in states.values())


def verify(source: Source, *, limit: int, on_read: Callable[[int], None] = silent_bytes) -> str:
    """Reads a source, and returns what was checked, in words. Raises CheckpointError with what is damaged. Rules are ignored.

    limit: bytes of one run. on_read: called with the number of bytes of each read.
    """
    if isinstance(source, Ruled):
        return verify(source.source, limit=limit, on_read=on_read)
    check = getattr(source, "verify", None)
    if check is not None:
        watch = getattr(source, "watch", silent_bytes)
        watch(on_read)
        try:
            return check() or "every block agrees with its checksum"
        finally:
            watch(silent_bytes)
    total = 0
    for name, states in source.contents.tensors.items():
        for state, spec in states.items():
            count, step = spec.elements, max(1, limit // spec.itemsize)
            for at in range(0, count, step):
                read = source.read(name, state, at, min(count, at + step)).nbytes
                total += read
                on_read(read)
    return f"{total} bytes read; the format has no checksums"
