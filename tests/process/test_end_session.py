"""Tests that processes which train_fn has started are ended, and leave no semaphores behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest

from elastic.host.process import end_session

PROGRAM = """
import multiprocessing, time
lock = multiprocessing.get_context("spawn").Lock()
print(lock._semlock.name, flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_what_is_left_ends_and_its_semaphores_are_removed() -> None:
    """By multiprocessing's own tracker, another process, which is left alone with them for a moment."""
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    mark = uuid4().hex
    started = os.environ | {"MARK": mark}
    child = subprocess.Popen([sys.executable, "-c", PROGRAM], env=started, start_new_session=True, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        semaphore = Path("/dev/shm/sem." + child.stdout.readline().strip().lstrip("/"))
        assert semaphore.exists()
        end_session(ended.pid, f"MARK={mark}")
        assert child.wait(5) == -9
        assert not semaphore.exists()
    finally:
        child.kill()
        child.communicate()
