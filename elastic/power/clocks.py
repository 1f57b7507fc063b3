"""An agent's way to the clocks of its host's GPUs: through the power daemon if there is one, else through a guardian of its own."""

from __future__ import annotations

import select
import socket
import subprocess
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from elastic.errors import PowerError
from elastic.host.channel import Channel, Message
from elastic.host.process import module_command
from elastic.power.conditions import Condition
from elastic.power.keeper import restore_left

_ANSWER_S, _CLOSE_S = 20.0, 5.0
_RESTARTS, _WITHIN_S = 3, 60.0


class Clocks:
    """Sets clocks of GPUs, and has them restored when this process ends. Every call may block; use it from one thread.

    `restored` lists the GPUs whose clocks earlier processes had left. Raises PowerError if clocks cannot be set on this host at all.
    """

    def __init__(self, job: str, directory: Path, daemon: Path) -> None:
        self._job, self._directory, self._daemon = job, directory, daemon
        self._guardian: subprocess.Popen[bytes] | None = None
        self._began = list[float]()
        self.restored: list[str] = []
        self._channel = self._connected()

    def lock(self, uuid: str, mhz: int, own: Collection[int] = ()) -> int:
        """Locks the clock of a GPU on which the processes `own` compute. Returns the clock that is read back. Raises PowerError."""
        return self._asked({"type": "lock", "gpu": uuid, "mhz": mhz, "own": list(own)})["mhz"]

    def claim(self, uuid: str, own: Collection[int] = ()) -> None:
        """Takes a GPU with its usual clock, on which the processes `own` compute. Raises PowerError if its clock may not be set."""
        self._asked({"type": "claim", "gpu": uuid, "own": list(own)})

    def unlock(self, uuid: str) -> None:
        """Restores the clock of a GPU. Raises PowerError."""
        self._asked({"type": "unlock", "gpu": uuid})

    @property
    def lost(self) -> bool:
        """Whether the guardian has died; `renew` restores its clocks and starts another one."""
        readable, _, _ = select.select([self._channel.sock], [], [], 0)
        return self._channel.closed or bool(readable)  # it says nothing unless it is asked

    def renew(self) -> None:
        """Restores the clocks that a dead guardian had set, at once, and starts another one.

        Raises PowerError if guardians die again and again.
        """
        now = time.monotonic()
        self._began = [at for at in self._began if now - at < _WITHIN_S]
        if len(self._began) > _RESTARTS:
            raise PowerError(
                f"the process that keeps the clocks has died {len(self._began)} times within {_WITHIN_S:.0f} s: no clock is set any more",
                condition=Condition.UNKNOWN.value,
            )
        guarded = self._guardian is not None
        self._end()
        if guarded:  # another guardian would restore too, but on a busy machine it may take seconds to start
            self.restored += restore_left(self._directory)[0]
        self._channel = self._connected()

    def close(self) -> list[str]:
        """Restores all clocks. Returns sentences on those that cannot be restored."""
        complaints: list[str] = []
        with suppress(PowerError):
            complaints = self._asked({"type": "close"})["complaints"]
        self._end()
        return complaints

    def _connected(self) -> Channel:
        self._began.append(time.monotonic())
        sock = self._daemon_socket()
        if sock is None:
            sock, theirs = socket.socketpair()
            with theirs:
                words = module_command("elastic.power.guardian", str(theirs.fileno()), str(self._directory), self._job)
                self._guardian = subprocess.Popen(
                    words, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
                )
        channel = Channel(sock)
        told = _answer(channel, _ANSWER_S)
        if told["type"] != "ready":
            channel.close()
            raise PowerError(told["why"], condition=told["condition"])
        self.restored += told["restored"]
        return channel

    def _daemon_socket(self) -> socket.socket | None:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(str(self._daemon))
        except OSError:
            sock.close()
            return None
        return sock

    def _asked(self, request: Message) -> Message:
        self._channel.send(request)
        told = _answer(self._channel, _ANSWER_S)
        if told["type"] in ("refused", "unusable"):
            raise PowerError(told["why"], condition=told["condition"])
        return told

    def _end(self) -> None:
        self._channel.close()
        if self._guardian is not None:
            try:
                self._guardian.wait(_CLOSE_S)  # it restores, and exits
            except subprocess.TimeoutExpired:
                self._guardian.kill()
                self._guardian.wait()
            self._guardian = None


def _answer(channel: Channel, seconds: float) -> Message:
    """Returns the next message. Raises PowerError if the other end is gone, or silent for so long."""
    deadline = time.monotonic() + seconds
    while not channel.closed:
        readable, _, _ = select.select([channel.sock], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            break
        for message in channel.receive():
            return message
    why = "has died" if channel.closed else f"has not answered for {seconds:.0f} s"
    channel.closed = True
    raise PowerError(f"the process that keeps the clocks {why}", condition=Condition.PASSING.value)
