"""The temporary directories of runs, and what is left of those that nobody could remove."""

from __future__ import annotations

import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from elastic.host.rundir import RunDirectory

_PREFIX, _MARK = "elastic-", "temporary"
_YOUNG_S = 60.0  # so old a directory has a lock, if its job runs


def temporary() -> RunDirectory:
    """Makes a directory that is removed when its job ends.

    Removes those of this user's jobs of which launcher and agent were killed together: nobody else would.
    """
    for left in _left():
        left.remove()
    path = Path(tempfile.mkdtemp(prefix=_PREFIX))
    (path / _MARK).touch(0o600)
    return RunDirectory(path)


def _left() -> Iterator[RunDirectory]:
    for mark in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_MARK}"):
        with suppress(OSError):
            made, place = mark.lstat(), mark.parent.lstat()
            own = made.st_uid == place.st_uid == os.geteuid() and stat.S_ISDIR(place.st_mode)
            directory = RunDirectory(mark.parent)
            if own and time.time() - made.st_mtime > _YOUNG_S and not directory.running:
                yield directory
