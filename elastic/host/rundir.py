"""The directory of one run: files that are kept, and files that are needed only while the job runs."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic.errors import SettingsError

_KEPT = ("members.json", "incidents.jsonl", "events.jsonl", "steps.jsonl", "live.json", "energy.json", "faults.jsonl")
OUTPUT = "output"
"""The folder of what workers have printed, a file for each."""

TRACE = "trace"
"""The folder of what workers record for a trace, a file for each."""

LINKS = "links"
"""The folder of the sockets at which workers of this host accept links."""

_NEW, _NEW_LIVE = "members.new", "live.new"
_UNFINISHED = (_NEW, _NEW_LIVE, "energy.new")  # what takes the place of a file when it is whole
_LOCK = "lock"
_OWN = 0o700  # other users of the host can neither read the job's files nor lock them
_MADE = ("torchinductor", "activity")
_SCRATCH = ("etcd", LINKS, TRACE, *_MADE)
TEMPORARY = (*_SCRATCH, *_UNFINISHED, _LOCK)
"""What is removed from a directory of the user's own when the job has ended."""

_IN_USE_S = 5.0  # how long to wait for an agent whose launcher was killed: it ends its job, which empties the directory
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The directory of a run. `members` lists the processes of the last committed view, `incidents` has a line per recovery, `events` one
    per event, `steps` one per step (or for some steps, in a long run); `live` is how the job stands now, written every second."""

    path: Path

    @property
    def members(self) -> Path:
        return self.path / "members.json"

    @property
    def incidents(self) -> Path:
        return self.path / "incidents.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def steps(self) -> Path:
        return self.path / "steps.jsonl"

    @property
    def live(self) -> Path:
        return self.path / "live.json"

    @property
    def output(self) -> Path:
        return self.path / OUTPUT

    @property
    def trace(self) -> Path:
        return self.path / TRACE

    @property
    def running(self) -> bool:
        """Whether the job runs: its launcher or its agent holds the lock."""
        try:
            descriptor = os.open(self.path / _LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno == errno.EWOULDBLOCK or (self.path / LINKS).exists()  # some file systems cannot lock
        else:
            return False
        finally:
            os.close(descriptor)

    @contextmanager
    def prepared(self) -> Generator[int]:
        """Makes the directory, removes the files of an earlier run, and locks it. Raises SettingsError if it cannot be used.

        The lock belongs to the descriptor: it lasts as long as a process has it open. So it also covers the agent's last removals of files
        if this process is killed.
        """
        with self._usable():
            self.path.mkdir(_OWN, parents=True, exist_ok=True)
            self._refuse_others()
            descriptor = self._locked()
        try:
            self.prepare()
            yield descriptor
        finally:
            os.close(descriptor)

    def prepare(self) -> None:
        """Makes the directory, and removes the files of an earlier run. Raises SettingsError if it cannot be used.

        Another user who can write in it could make the run overwrite this user's files, through symbolic links at the run's file names.
        """
        with self._usable():
            self.path.mkdir(_OWN, parents=True, exist_ok=True)
            self._refuse_others()
            for name in (*_KEPT, *_UNFINISHED):
                (self.path / name).unlink(missing_ok=True)
            self._clear()
            self._remove(OUTPUT)
            for name in _MADE:
                (self.path / name).mkdir(_OWN)

    @contextmanager
    def _usable(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            name = "" if error.filename in (None, str(self.path)) else f" ({os.path.basename(error.filename)})"
            raise SettingsError(f"directory={str(self.path)!r} cannot be used: {error.strerror}{name}") from error

    def _locked(self) -> int:
        """Returns a descriptor of the lock, a file that no other user can open: a directory can be locked by everyone who may read it.

        Raises SettingsError if another job runs in the directory. Some network file systems cannot lock: there nothing is refused.
        """
        until = time.monotonic() + _IN_USE_S
        while True:
            descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                self._lock(descriptor, until)
                if self._current(descriptor):
                    return descriptor
            except SettingsError:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _current(self, descriptor: int) -> bool:
        """Whether this is the lock, and not one that a job has removed at its end."""
        try:
            return os.path.samestat(os.fstat(descriptor), (self.path / _LOCK).lstat())
        except FileNotFoundError:
            return False

    def _lock(self, descriptor: int, until: float) -> None:
        while True:
            try:
                return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno != errno.EWOULDBLOCK:
                    return None
            if time.monotonic() >= until:
                raise SettingsError(f"directory={str(self.path)!r} is in use by another job, which is still running: use one for each job")
            time.sleep(_POLL_S)

    def _refuse_others(self) -> None:
        found, me = self.path.stat(), os.geteuid()
        owners = {found.st_uid, self.path.lstat().st_uid} - {me}
        if owners:
            raise SettingsError(
                f"directory={str(self.path)!r} belongs to another user of this host (uid {min(owners)}), who could make the job overwrite "
                f"your files: use a directory of your own, such as a new one in it ({str(self.path / 'run')!r})"
            )
        if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
            raise SettingsError(
                f"directory={str(self.path)!r} can be written by every user of this host, who could make the job overwrite your files: "
                "remove that permission (chmod o-w), or use another directory"
            )

    def clear(self) -> None:
        """Removes files needed only while the job runs, the lock too; a symbolic link is removed itself, never its target."""
        self._clear()
        with suppress(OSError):
            (self.path / _LOCK).unlink()

    def _clear(self) -> None:
        for name in (*_SCRATCH, *_UNFINISHED):
            self._remove(name)

    def _remove(self, name: str) -> None:
        path = self.path / name
        with suppress(OSError):
            if not stat.S_ISDIR(path.lstat().st_mode):
                path.unlink()
        shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """Removes the whole directory."""
        shutil.rmtree(self.path, ignore_errors=True)

    def write_members(self, record: dict[str, Any]) -> None:
        """Replaces the file atomically: readers see the old one or the new one. If it cannot be written, the old one stays."""
        self._replace(_NEW, self.members, record)

    def write_live(self, record: dict[str, Any]) -> None:
        """Replaces how the job stands now, like `write_members`."""
        self._replace(_NEW_LIVE, self.live, record)

    def _replace(self, name: str, path: Path, record: dict[str, Any]) -> None:
        new = self.path / name
        with suppress(OSError):  # no space, or the directory is gone: no reason to end a running job
            new.unlink(missing_ok=True)
            try:
                with new.open("x") as file:  # never through a symbolic link
                    file.write(json.dumps(record))
                os.replace(new, path)
            except OSError:
                new.unlink()
                raise
