"""The root form of the guardian: lets named users lock the clocks of named GPUs, over a UNIX socket, and does nothing else.

A client's user is what the kernel says (`SO_PEERCRED`). Each connection is a session of its own: when it ends, however that was, the clocks
that were set over it are restored. A GPU has one session at a time.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import stat
import struct
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from elastic.errors import SettingsError
from elastic.power.conditions import Condition, power_error
from elastic.power.keeper import Keeper, restore_left
from elastic.power.nvml import Nvml
from elastic.power.records import Records
from elastic.power.session import Message, answered

_LONGEST_LINE, _MOST_CLIENTS = 4096, 64
_SEND_S = 1.0
_AGAIN_S = 5.0
"""How often clocks are tried again that could not be restored, because their GPU was lost or busy."""


class _Client:
    """One connection."""

    def __init__(self, sock: socket.socket, keeper: Keeper, user: int) -> None:
        self.sock, self._keeper, self._user, self._incoming = sock, keeper, user, b""

    def heard(self) -> bool:
        """Answers what has arrived. Returns False if the connection has ended, or broke the protocol."""
        try:
            data = self.sock.recv(_LONGEST_LINE)
            *lines, self._incoming = (self._incoming + data).split(b"\n")
            for line in lines:
                request = json.loads(line)
                if not isinstance(request, dict):
                    return False
                send(self.sock, answered(self._keeper, {**request, "own": self._processes(request.get("own"))}))
        except (OSError, ValueError, RecursionError):
            return False
        return bool(data) and len(self._incoming) < _LONGEST_LINE

    def _processes(self, given: object) -> list[int]:
        """Returns those of the given processes that belong to the client's user."""
        found = []
        for pid in given if isinstance(given, list) else []:
            with suppress(OSError):
                if isinstance(pid, int) and Path(f"/proc/{pid}").stat().st_uid == self._user:
                    found.append(pid)
        return found

    def close(self) -> list[str]:
        """Restores the client's clocks. Returns sentences on those that cannot be restored."""
        self.sock.close()
        return self._keeper.close()


def send(sock: socket.socket, message: Message) -> None:
    """Sends one message. Raises OSError if the client does not read."""
    sock.settimeout(_SEND_S)
    sock.sendall(json.dumps(message).encode() + b"\n")


def user_of(sock: socket.socket) -> tuple[int, int]:
    """Returns process and user at the other end of a UNIX socket."""
    pid, user, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return pid, user


class Daemon:
    """Serves `users` at the socket `path`, for the clocks of the GPUs `allowed`. Raises SettingsError or PowerError if it cannot."""

    def __init__(self, path: Path, allowed: Collection[str], users: Collection[int], directory: Path) -> None:
        self._path, self._allowed, self._users = path, frozenset(allowed), frozenset(users)
        self._nvml = Nvml()
        for uuid in sorted(self._allowed):
            self._nvml.gpu(uuid)  # named wrongly: say so now
        self._records, self._directory = Records(directory), directory
        self._again_at = time.monotonic() + _AGAIN_S
        for sentence in restore_left(directory)[1]:
            _log(sentence)
        self._clients: dict[socket.socket, _Client] = {}
        self._selector = selectors.DefaultSelector()
        self._listener = _listener(path)
        self._inode = _inode(path)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._over = False

    def serve(self) -> None:
        """Serves until `stop`; then restores all clocks, and removes the socket."""
        try:
            while not self._over:
                for key, _ in self._selector.select(0.5):
                    self._accept() if key.fileobj is self._listener else self._hear(self._clients[key.fileobj])  # pyright: ignore[reportArgumentType]
                if time.monotonic() > self._again_at:
                    self._restore_again()
        finally:
            for client in list(self._clients.values()):
                self._drop(client)
            self._listener.close()
            if _inode(self._path) == self._inode:  # else it is a successor's, or somebody has removed it
                self._path.unlink(missing_ok=True)

    def stop(self) -> None:
        """Ends `serve` soon."""
        self._over = True

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        pid, user = user_of(sock)
        if user not in self._users or len(self._clients) >= _MOST_CLIENTS:
            unknown = f"user {user} may not set clocks here: start it with --user {user} too"
            why = unknown if user not in self._users else f"it has {_MOST_CLIENTS} sessions already: end some of their jobs"
            with suppress(OSError):
                send(sock, {"type": "unusable", "condition": Condition.NO_PERMISSION.value, "why": f"the power daemon refuses: {why}"})
            sock.close()
            return
        keeper = Keeper(self._nvml, self._records, f"of user {user}, process {pid}", self._allowed)
        self._clients[sock] = _Client(sock, keeper, user)
        self._selector.register(sock, selectors.EVENT_READ)
        with suppress(OSError):  # it is gone: the next event says so
            send(sock, {"type": "ready", "restored": [], "complaints": []})

    def _hear(self, client: _Client) -> None:
        if not client.heard():
            self._drop(client)

    def _drop(self, client: _Client) -> None:
        self._selector.unregister(client.sock)
        self._clients.pop(client.sock, None)
        for sentence in client.close():
            _log(sentence)

    def _restore_again(self) -> None:
        """Restores clocks of sessions that have ended, as far as their GPUs answer again by now."""
        self._again_at = time.monotonic() + _AGAIN_S
        if self._records.uuids() and (restored := restore_left(self._directory)[0]):
            _log(f"restored by now: {', '.join(restored)}")


def _inode(path: Path) -> tuple[int, int] | None:
    """Returns what identifies the file at the path; None if there is none."""
    with suppress(OSError):
        status = path.lstat()
        return status.st_dev, status.st_ino
    return None


def _listener(path: Path) -> socket.socket:
    """Listens at the path, which a daemon that was killed may have left. Raises SettingsError if anything else is there."""
    with suppress(OSError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise SettingsError(f"the power daemon cannot listen at {path}: it is there, and is no socket")
    if _answers(path):
        raise SettingsError(f"another power daemon listens at {path}")
    listener = socket.socket(socket.AF_UNIX)
    try:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        os.chmod(path, 0o666)  # who may do what is decided by the client's user
        listener.listen(16)
    except OSError as error:
        listener.close()
        advice = "run it as root, or give another --socket to it and in ELASTIC_POWER_SOCKET to jobs"
        raise SettingsError(f"the power daemon cannot listen at {path}: {error.strerror or error}; {advice}") from error
    return listener


def _answers(path: Path) -> bool:
    """Whether somebody listens at the path; also if so many wait there already that no more are taken."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:
            return True
        except OSError:
            return False
    return True


def _log(sentence: str) -> None:
    print(f"elastic power-daemon: {sentence}", file=sys.stderr, flush=True)


def run(path: Path, allowed: Collection[str], users: Collection[int], directory: Path) -> None:
    """Runs a daemon until SIGTERM or SIGINT. With no GPU in `allowed`, all of the host are."""
    if not allowed:
        nvml = Nvml()
        allowed = nvml.uuids()
        nvml.close()
    if not allowed:
        raise power_error(Condition.NO_GPU, "no GPU answers on this host")
    daemon = Daemon(path, allowed, users, directory)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: daemon.stop())
    _log(f"listens at {path} for users {sorted(users)}, GPUs {', '.join(sorted(allowed))}")
    daemon.serve()
