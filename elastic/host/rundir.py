"""The directory of one run: what it keeps about the job, and what is only needed while it runs."""

from __future__ import annotations

import json
import os
import shutil
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic.errors import SettingsError

_KEPT = ("members.json", "incidents.jsonl", "faults.jsonl")  # the last one is of whoever injects faults, and nobody else reads it
LINKS = "links"
"""The folder of the sockets at which workers of this host accept links."""

_NEW = "members.new"
_OPEN = 0o755  # anyone on the host may read what workers do
_MADE = ("torchinductor", "activity")
_SCRATCH = ("etcd", LINKS, *_MADE)


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
        """Makes it, and removes what an earlier run in it has left. Raises SettingsError if it cannot be used.

        Another user who can write in it could have this user's files overwritten, by symbolic links in the places of the run's own.
        """
        try:
            self.path.mkdir(_OPEN, parents=True, exist_ok=True)
            self._refuse_others()
            for name in (*_KEPT, _NEW):
                (self.path / name).unlink(missing_ok=True)
            self.clear()
            for name in _MADE:
                (self.path / name).mkdir(_OPEN)
        except OSError as error:
            name = "" if error.filename in (None, str(self.path)) else f" ({os.path.basename(error.filename)})"
            raise SettingsError(f"directory={str(self.path)!r} cannot be used: {error.strerror}{name}") from error

    def _refuse_others(self) -> None:
        found, me = self.path.stat(), os.geteuid()
        owners = {found.st_uid, self.path.lstat().st_uid} - {me}
        if owners:
            raise SettingsError(
                f"directory={str(self.path)!r} belongs to another user of this host (uid {min(owners)}), who could have files of yours "
                f"overwritten through it: give one of your own, such as a new one in it ({str(self.path / 'run')!r})"
            )
        if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
            raise SettingsError(
                f"directory={str(self.path)!r} can be written by every user of this host, who could have files of yours overwritten "
                "through it: take that away (chmod o-w), or give another one"
            )

    def clear(self) -> None:
        """Removes what is only needed while the job runs; of a symbolic link itself, never what it points to."""
        for name in _SCRATCH:
            path = self.path / name
            with suppress(OSError):
                if not stat.S_ISDIR(path.lstat().st_mode):
                    path.unlink()
            shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """Removes all of it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def write_members(self, record: dict[str, Any]) -> None:
        """Replaces the file at once: readers see the old one or the new one. Where it cannot be written, it stays as it is."""
        new = self.path / _NEW
        with suppress(OSError):  # no room, or the directory is gone: no reason to end a job that runs
            new.unlink(missing_ok=True)
            with new.open("x") as file:  # never through a symbolic link
                file.write(json.dumps(record))
            os.replace(new, self.members)
