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
from elastic.power.nvml import Nvml

_CONNECT_S, _ANSWER_S, _CLOSE_S = 2.0, 20.0, 4.0
_RESTARTS, _WITHIN_S = 3, 60.0
_BACK_S, _LOOK_S = 5.0, 0.1
"""How long a power daemon that has ended is waited for: what starts it again takes some time."""


class Clocks:
    """Sets clocks of GPUs, and has them restored when this process ends. Every call may block; use it from one thread.

    `restored` lists the GPUs whose clocks earlier processes had left. Raises PowerError if clocks cannot be set on this host at all.
    """

    def __init__(self, job: str, directory: Path, daemon: Path) -> None:
        self._job, self._directory, self._daemon = job, directory, daemon
        self._guardian: subprocess.Popen[bytes] | None = None
        self._began = list[float]()
        self._locked = set[str]()
        self.restored: list[str] = []
        self._channel = self._connected()

    def lock(self, uuid: str, mhz: int, own: Collection[int] = ()) -> int:
        """Locks the clock of a GPU on which the processes `own` compute. Returns the clock that is read back. Raises PowerError."""
        self._locked.add(uuid)
        return self._asked({"type": "lock", "gpu": uuid, "mhz": mhz, "own": list(own)})["mhz"]

    def claim(self, uuid: str, own: Collection[int] = ()) -> None:
        """Takes a GPU with its usual clock, on which the processes `own` compute. Raises PowerError if its clock may not be set."""
        self._asked({"type": "claim", "gpu": uuid, "own": list(own)})

    def unlock(self, uuid: str) -> None:
        """Restores the clock of a GPU. Raises PowerError."""
        self._asked({"type": "unlock", "gpu": uuid})
        self._locked.discard(uuid)

    @property
    def lost(self) -> bool:
        """Whether the guardian has died, or did not answer; `renew` restores its clocks and starts another one."""
        readable, _, _ = select.select([self._channel.sock], [], [], 0)
        return self._channel.closed or bool(readable)  # it says nothing unless it is asked

    def renew(self) -> list[str]:
        """Restores the clocks that a dead guardian had set, at once, and starts another one.

        Returns sentences on those that cannot be restored. Raises PowerError if guardians die again and again: then all clocks are
        restored, as far as they can be, and none is set any more.
        """
        back_s = _BACK_S if self._guardian is None else 0.0
        complaints = self._ended()
        now = time.monotonic()
        self._began = [at for at in self._began if now - at < _WITHIN_S]
        if len(self._began) > _RESTARTS:
            raise PowerError(
                "; ".join(
                    [
                        f"the process that keeps the clocks has died {len(self._began)} times within {_WITHIN_S:.0f} s",
                        *complaints,
                        "no clock is set any more in this job: look for what kills it",
                    ]
                ),
                condition=Condition.UNKNOWN.value,
            )
        try:
            self._channel = self._connected(back_s)
        except PowerError as error:
            why = f"the process that keeps the clocks has ended, and no clock is set any more in this job: {error}"
            raise PowerError("; ".join([*complaints, why]), condition=error.condition) from error
        return complaints if self._guardian is not None else []  # a daemon restores what another one left before it listens

    def close(self) -> list[str]:
        """Restores all clocks, also if the guardian does not do it. Returns sentences on those that cannot be restored."""
        try:
            complaints = self._asked({"type": "close"})["complaints"]
        except PowerError:
            return self._ended()
        self._end()
        return complaints

    def _ended(self) -> list[str]:
        """Ends a guardian that has died or does not answer, and restores what it has left: a successor may take seconds to start.

        Returns sentences on clocks that cannot be restored.
        """
        guardian, locked = self._guardian, sorted(self._locked)
        self._end()
        self._locked.clear()
        if guardian is not None:  # one that was asked to end has restored what has no record any more
            restored, complaints = _restored(self._directory, locked if guardian.returncode != 0 else [])
            self.restored += restored
            return complaints
        if not locked:
            return []
        return [f"the power daemon has ended or does not answer: it restores the clock of {', '.join(locked)} when it is started again"]

    def _connected(self, back_s: float = 0.0) -> Channel:
        """Connects to the daemon, for which it waits `back_s` seconds, or starts a guardian."""
        self._began.append(time.monotonic())
        while (sock := self._daemon_socket()) is None and time.monotonic() < self._began[-1] + back_s:
            time.sleep(_LOOK_S)  # nothing tells when another process listens
        if sock is None:
            sock, theirs = socket.socketpair()
            with theirs:
                words = module_command("elastic.power.guardian", str(theirs.fileno()), str(self._directory), self._job)
                self._guardian = subprocess.Popen(
                    words, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
                )
        self._channel = channel = Channel(sock)
        try:
            told = _answer(channel, _ANSWER_S)
            if told["type"] != "ready":
                raise PowerError(told["why"], condition=told["condition"])
        except PowerError:
            self._end()
            raise
        self.restored += told["restored"]
        return channel

    def _daemon_socket(self) -> socket.socket | None:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(_CONNECT_S)  # a daemon that is stopped takes no more connections at some time
        try:
            sock.connect(str(self._daemon))
        except OSError:
            sock.close()
            return None
        sock.settimeout(None)
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
                with suppress(subprocess.TimeoutExpired):  # it hangs in a call of the driver
                    self._guardian.wait(1.0)
            self._guardian = None


def _restored(directory: Path, locked: list[str]) -> tuple[list[str], list[str]]:
    """Restores what a dead guardian has left. If their directory is somebody else's by now, this process alone knows it."""
    try:
        return restore_left(directory, known=locked)
    except PowerError as error:
        why = str(error)
    try:
        nvml = Nvml()
        for uuid in locked:
            nvml.gpu(uuid).unlock()
        nvml.close()
    except PowerError as error:
        return [], [why, str(error)]
    return locked, [] if locked else [why]


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
