"""Launchers as separate processes, for tests that interrupt or kill them or read the user's output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Leftovers

ROOT = Path(__file__).parents[2]
LIMIT_S = 60


class Launcher:
    """`launch.py` in a process: `lines` reads what its workers printed."""

    def __init__(
        self, *arguments: str, script: str = "launch.py", python: str = sys.executable, ignored: tuple[int, ...] = (), **environment: str
    ) -> None:
        self.process = subprocess.Popen(
            [python, str(ROOT / "tests" / "process" / script), *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: [signal.signal(number, signal.SIG_IGN) for number in ignored],
        )

    def lines(self, count: int) -> list[dict[str, Any]]:
        assert self.process.stdout is not None
        lines = [self.process.stdout.readline() for _ in range(count)]
        if not all(lines):
            pytest.fail(f"the job ended early:\n{self.finish()[2]}")
        return [json.loads(line) for line in lines]

    def finish(self) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        out, err = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, out, err


@pytest.fixture
def launch(leftovers: Leftovers) -> Iterator[type[Launcher]]:
    """Starts launchers; they do not outlive the test."""
    started: list[Launcher] = []

    class Started(Launcher):
        def __init__(self, *arguments: str, **options: str) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    yield Started
    for launcher in started:
        launcher.process.kill()
        launcher.process.wait()
        for pipe in (launcher.process.stdout, launcher.process.stderr):
            assert pipe is not None
            pipe.close()  # not read to the end: processes that a failed test left may hold it open
