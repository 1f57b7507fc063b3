"""The file of a pickle, and limits on its size. A pickle alone in a file refers to no storage; one in an archive does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from elastic.checkpoint.stored import Files
from elastic.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class PickleLimits:
    """Limits against exhaustion of memory and time: bytes of the pickle, its operations, members of the zip file."""

    pickle_bytes: int = 256 << 20
    operations: int = 20_000_000
    members: int = 1_000_000


class Origin:
    """A file, or the part of it from byte `offset` on; it is read through `files`."""

    def __init__(self, path: Path, limits: PickleLimits, *, files: Files | None = None, offset: int = 0) -> None:
        self.path, self.limits, self.offset = path, limits, offset
        self.files = Files() if files is None else files

    @property
    def where(self) -> str:
        """The file for messages, with the offset if it is not 0."""
        return f"{self.path}" + (f" at byte {self.offset}" if self.offset else "")

    def refuse(self, reason: str) -> CheckpointError:
        """Returns the error to raise, with file and reason."""
        return CheckpointError(f"{self.where}: {reason}")

    def storage(self, key: str) -> tuple[int, int]:
        """Returns a storage's offset in the file, and its bytes. Raises CheckpointError if there is none."""
        raise self.refuse(f"it refers to storage {key!r}, but it is not an archive")
