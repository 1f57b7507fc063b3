"""The directory of one run: what it keeps about the job, and what is only needed while it runs."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic.errors import SettingsError

_KEPT = ("members.json", "incidents.jsonl", "faults.jsonl")  # the last one is of whoever injects faults, and nobody else reads it
LINKS = "links"
"""The folder of the sockets at which workers of this host accept links."""

_SCRATCH = ("etcd", "torchinductor", "activity", LINKS)


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """`members` names the processes of the last committed view, `incidents` has a line per recovery."""

    path: Path

    @property
    def members(self) -> Path:
        return self.path / "members.json"

    @property
    def incidents(self) -> Path:
        return self.path / "incidents.jsonl"

    def prepare(self) -> None:
        """Makes it, and removes what an earlier run in it has left. Raises SettingsError if it cannot be used."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in _KEPT:
                (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise SettingsError(f"directory={str(self.path)!r} cannot be used: {error.strerror}") from error
        self.clear()

    def clear(self) -> None:
        """Removes what is only needed while the job runs."""
        for name in _SCRATCH:
            shutil.rmtree(self.path / name, ignore_errors=True)

    def remove(self) -> None:
        """Removes all of it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def write_members(self, record: dict[str, Any]) -> None:
        """Replaces the file at once: readers see the old one or the new one. Where it cannot be written, it stays as it is."""
        new = self.members.with_suffix(".new")
        with suppress(OSError):  # no room, or the directory is gone: no reason to end a job that runs
            new.write_text(json.dumps(record))
            os.replace(new, self.members)
