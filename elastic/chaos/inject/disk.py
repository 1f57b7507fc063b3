"""A full disk: run directories lie on a small file system of their own, which is filled."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from elastic.chaos.scene import Effect, NoEffect, Scene
from elastic.errors import SettingsError

_MIB = 1 << 20
_SIZE_MIB = 320
_FILL = "filled-by-chaos"


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Mounts a small file system at a folder. Raises SettingsError where that is not permitted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={_SIZE_MIB}m,mode=0700", "elastic-chaos", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        why = error.stderr.decode().strip() if isinstance(error, subprocess.CalledProcessError) else error
        raise SettingsError(
            f"disk-full needs a small file system of its own, and cannot mount one ({why}): be root, or leave it out"
        ) from None
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)


def disk_full(scene: Scene, effect: Effect) -> None:
    """Fills the file system, and makes room again later."""
    with scene.turn("the disk"):
        _full(scene, effect)


def _full(scene: Scene, effect: Effect) -> None:
    path = scene.job.disk / _FILL
    effect.at = time.monotonic()
    written = 0
    try:
        with path.open("wb", buffering=0) as file:
            for size in (_MIB, 4096, 1):
                written += _fill(file.fileno(), size)
            scene.last(effect.injection.lasts_s)
            refused = _fill(file.fileno(), 1) == 0 or written > 0
    finally:
        with suppress(OSError):
            path.unlink()
    if not written or not refused:
        raise NoEffect("nothing could be written")
    effect.proof = f"a write failed (no space left on device) after {written >> 20} MiB"


def _fill(file: int, size: int) -> int:
    """Writes blocks of this size until there is no space; returns the bytes written."""
    block, written = bytes(size), 0
    while written < 2 * _SIZE_MIB * _MIB:
        try:
            written += os.write(file, block)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return written
            raise
    raise NoEffect(f"the file system took more than {2 * _SIZE_MIB} MiB")
