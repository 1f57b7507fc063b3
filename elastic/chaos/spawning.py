"""Starts processes that end with this one. The kernel ends them with the *thread* that started them, so one thread starts all."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from elastic.errors import SettingsError
from elastic.host.process import tied_command


@functools.cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="elastic-chaos-spawn")


_ROOT = Path(__file__).parents[2]


def environment(**more: str) -> dict[str, str]:
    """The environment of a process that imports this Elastic and the user's modules."""
    paths = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, **more, "PYTHONPATH": paths}


def spawned(command: Sequence[str], *, out: IO[bytes], env: Mapping[str, str], cwd: Path | None = None) -> subprocess.Popen[bytes]:
    """Starts a command without input, whose output goes to `out`. Any thread may call it. Raises SettingsError."""
    program = shutil.which(command[0])
    if program is None:
        raise SettingsError(f"there is no program {command[0]} on this machine")
    words = tied_command([program, *command[1:]])

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, cwd=cwd)

    return _thread().submit(start).result()
