"""Where a pickle lies, and what it may ask of its reader. A pickle that lies alone refers to no storage; one in an archive does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from elastic.checkpoint.stored import Files
from elastic.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class PickleLimits:
    """What a file may ask of its reader: bytes of the pickle, its operations, members of the zip file."""

    pickle_bytes: int = 256 << 20
    operations: int = 20_000_000
    members: int = 1_000_000


class Origin:
    """A file, or what begins at byte `offset` of it; what is read from it is read through `files`."""

    def __init__(self, path: Path, limits: PickleLimits, *, files: Files | None = None, offset: int = 0) -> None:
        self.path, self.limits, self.offset = path, limits, offset
        self.files = Files() if files is None else files

    @property
    def where(self) -> str:
        """The file, and the offset if it is a part of one."""
        return f"{self.path}" + (f" at byte {self.offset}" if self.offset else "")

    def refuse(self, reason: str) -> CheckpointError:
        """The error to raise."""
        return CheckpointError(f"{self.where}: {reason}")

    def storage(self, key: str) -> tuple[int, int]:
        """Where in the file a storage begins, and its bytes. Raises CheckpointError if there is none."""
        raise self.refuse(f"it refers to storage {key!r}, but is no archive")
