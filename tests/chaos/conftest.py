"""A miniature job: forked children that report the activity the test sets, and the files that an agent would write."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from elastic.observe.activity import Activity
from elastic.observe.json_lines import read_lines
from tests.conftest import wait_for_end

PATIENCE_S = 10.0


class Puppet:
    """A worker process that enters exactly the activities it is sent; with `step_s` it runs steps of that length without orders."""

    def __init__(self, directory: Path, worker: int, step_s: float | None = None) -> None:
        self.worker = worker
        self._socket, far = socket.socketpair()
        self._turn = threading.Lock()  # replies go to the sender
        self.pid = os.fork()
        if self.pid == 0:
            self._socket.close()
            try:
                _run_steps(directory, worker, step_s) if step_s is not None else _obey(directory, worker, far)
            finally:
                os._exit(1)
        far.close()
        self._reaped = False

    def enter(self, phase: str, step: int, epoch: int = 1) -> None:
        """Returns when it has, or has been killed."""
        with self._turn, suppress(ConnectionError):
            self._socket.sendall(json.dumps([phase, step, epoch]).encode().ljust(64))
            self._socket.recv(1)

    def dies(self, seconds: float = PATIENCE_S) -> bool:
        """Whether it is killed within this time."""
        if not self._reaped and wait_for_end(self.pid, seconds):
            assert os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) == -signal.SIGKILL
            self._reaped = True
        return self._reaped

    def end(self) -> None:
        if not self._reaped:
            os.kill(self.pid, signal.SIGKILL)
            assert self.dies()
        self._socket.close()


def _obey(directory: Path, worker: int, commands: socket.socket) -> None:
    activity = Activity(directory, worker)
    while command := commands.recv(64, socket.MSG_WAITALL):
        activity.enter(*json.loads(command))
        commands.sendall(b".")


def _run_steps(directory: Path, worker: int, step_s: float) -> None:
    activity, pause = Activity(directory, worker), threading.Event()
    for step in range(1 << 20):
        for phase in ("forward", "backward", "reduce", "apply"):
            activity.enter(phase, step, 1)
            pause.wait(step_s / 4)


class Stage:
    """The run directory and the puppets of one test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.puppets: list[Puppet] = []

    def puppet(self, count: int, **options: Any) -> list[Puppet]:
        """New workers; to be called before a killer starts, since it is a thread, and forks should not copy its locks."""
        new = [Puppet(self.directory, len(self.puppets) + index, **options) for index in range(count)]
        self.puppets += new
        return new

    def commit(self, epoch: int, members: Sequence[Puppet], **more: Any) -> None:
        """Does what an agent does when a view is committed."""
        listed = [{"worker": puppet.worker, "pid": puppet.pid, "host": "here", "stage": 0} for puppet in members]
        record = {"epoch": epoch, "attempt": 0, "members": listed, "coordinator": 0, "agent": 1, "forkserver": os.getpid()}
        new = self.directory / "members.new"
        new.write_text(json.dumps({**record, **more}))
        os.replace(new, self.directory / "members.json")

    def lines(self) -> list[dict[str, Any]]:
        return read_lines(self.directory / "faults.jsonl")


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path)
    yield made
    for puppet in made.puppets:
        puppet.end()
