"""Starts processes that end with this one. The kernel ends them with the *thread* that started them, so one thread starts all."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from elastic.errors import SettingsError
from elastic.host.process import tied_command


@functools.cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="elastic-chaos-spawn")


def spawned(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Starts a command without input; `options` are those of subprocess.Popen. Any thread may call it. Raises SettingsError."""
    program = shutil.which(command[0])
    if program is None:
        raise SettingsError(f"there is no program {command[0]} on this machine")
    words = tied_command([program, *command[1:]])
    return _thread().submit(_started, words, options).result()


def _started(words: list[str], options: dict[str, Any]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, text=False, **options)
