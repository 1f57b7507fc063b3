"""Hosts where network namespaces are not permitted: each has a loopback address of its own, and its TCP connections go through a proxy.

A host's cable is cut by its proxy, which then passes nothing on, in either direction, and closes nothing.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

_FOLDER = Path(__file__).parent / "through_proxy"
_BYTES = 1 << 18
_PRIORITY = -10  # of threads that pass bytes on, in the sense of nice


class Proxies:
    """Has the interface of `namespaces.Network`."""

    def __init__(self, hosts: int) -> None:
        self.gateway = "127.0.0.1"
        self.addresses = [f"127.0.1.{host + 1}" for host in range(hosts)]
        self._cut: set[str] = set()
        self._late: dict[str, float] = {}
        self._changed = threading.Condition()
        self._listeners: list[socket.socket] = []
        self._ports: list[int] = []
        self._echo = 0

    def command(self, host: int) -> list[str]:
        """Returns the words before a command that runs on this host: none."""
        return []

    def environment(self, host: int) -> dict[str, str]:
        """Returns the variables that make the processes of a host connect through its proxy."""
        return {"PROXY_PORT": str(self._ports[host]), "PYTHONPATH": os.pathsep.join([str(_FOLDER), *sys.path[:1], str(_FOLDER.parents[2])])}

    def options(self, host: int) -> list[str]:
        """Returns more options for this host's agent."""
        return ["--interface", self.addresses[host]]

    def etcd_ports(self, host: int, ports: Sequence[int]) -> Sequence[int]:
        """Returns ports of this machine at which a host reaches these: the client of etcd is not written in Python."""
        address = self.addresses[host]
        return tuple(self._listen(lambda sock, port=port: self._serve(sock, address, self.gateway, port)) for port in ports)

    def cut(self, host: int) -> None:
        """Cuts a host's cable."""
        with self._changed:
            self._cut.add(self.addresses[host])

    def heal(self, host: int) -> None:
        """Undoes `cut`."""
        with self._changed:
            self._cut.discard(self.addresses[host])
            self._changed.notify_all()

    def delay(self, host: int, milliseconds: float) -> None:
        """Makes all that a host sends through its proxy arrive later; 0 undoes it."""
        with self._changed:
            self._late[self.addresses[host]] = milliseconds / 1000

    def reached_s(self, host: int, port: int, limit_s: float = 1.0) -> float | None:
        """The seconds in which a byte comes back to a host through its proxy, None if it does not within `limit_s`; `port` is not used,
        since a program that answers with the same byte is among the proxies."""
        try:
            with socket.create_connection((self.gateway, self._ports[host]), timeout=limit_s) as sock:
                began = time.monotonic()
                sock.sendall(f"{self.gateway}:{self._echo}\n.".encode())
                return time.monotonic() - began if sock.recv(1) else None
        except OSError:
            return None

    def make(self) -> None:
        """Starts the proxies."""
        self._echo = self._listen(_answer)
        for address in self.addresses:
            self._ports.append(self._listen(lambda sock, address=address: self._dialed(sock, address)))

    def remove(self) -> None:
        """Ends the proxies."""
        for listener in self._listeners:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def _listen(self, serve: Callable[[socket.socket], None]) -> int:
        """Returns a port of which every connection is served in a thread of its own."""
        listener = socket.create_server((self.gateway, 0), backlog=256)
        self._listeners.append(listener)

        def accept() -> None:
            with suppress(OSError):  # it is closed
                while True:
                    _in_thread(serve, listener.accept()[0])

        _in_thread(accept)
        return listener.getsockname()[1]

    def _dialed(self, sock: socket.socket, source: str) -> None:
        """Serves a connection whose first line says where it goes."""
        line = b""
        while not line.endswith(b"\n"):
            more = sock.recv(1)
            if not more:
                sock.close()
                return
            line += more
        address, _, port = line.decode().strip().rpartition(":")
        self._serve(sock, source, address, int(port))

    def _serve(self, sock: socket.socket, source: str, target: str, port: int) -> None:
        self._wait(source, target)
        try:
            other = socket.create_connection((target, port), timeout=5.0)
        except OSError:
            sock.close()
            return
        with sock, other:
            for end in (sock, other):
                end.settimeout(None)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            there = _in_thread(self._pass_on, sock, other, source, target)
            self._pass_on(other, sock, source, target)
            there.join()

    def _wait(self, source: str, target: str) -> None:
        """Waits until no cable on the way is cut."""
        with self._changed:
            self._changed.wait_for(lambda: not self._cut & {source, target})

    def _pass_on(self, sock: socket.socket, to: socket.socket, source: str, target: str) -> None:
        with suppress(OSError):
            while data := sock.recv(_BYTES):
                self._wait(source, target)
                time.sleep(self._late.get(source, 0.0))
                to.sendall(data)
        self._wait(source, target)
        for end in (sock, to):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def _answer(sock: socket.socket) -> None:
    """Sends back what comes."""
    with sock, suppress(OSError):
        while data := sock.recv(_BYTES):
            sock.sendall(data)


def _in_thread(function: Callable[..., None], *arguments: object) -> threading.Thread:
    def run() -> None:
        with suppress(OSError):  # a cable does not wait for a processor; without root it may have to
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _PRIORITY)
        function(*arguments)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread
