"""Somebody on the network without the secret, who knows where a job's processes listen, and does what he can to them."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

Address = tuple[str, int]

SAID = (
    b"GET / HTTP/1.1\r\n\r\n" * 9,
    b"",
    bytes(36),  # half of an answer
    struct.pack("<II", 1, 0) + bytes(64),
    b"\xff" * 1_000_000,
    b"\x16\x03\x01\xff\xff" * 50,  # TLS, with the longest record
    b'{"type": "hello"}\n' * 100,
)
_HELD = 600  # connections at a time


def listening(pids: Iterable[int]) -> dict[int, list[Address]]:
    """The TCP addresses at which these processes listen."""
    inodes = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == "0A":
            ip, port = words[1].split(":")
            inodes[words[9]] = (socket.inet_ntoa(struct.pack("<I", int(ip, 16))), int(port, 16))
    found: dict[int, list[Address]] = {}
    for pid in pids:
        links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
        found[pid] = [inodes[link[8:-1]] for link in links if link.startswith("socket:[") and link[8:-1] in inodes]
    return found


def size(pid: int) -> tuple[int, int]:
    """The number of a process's descriptors, and its resident memory without what it shares, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return len(os.listdir(f"/proc/{pid}/fd")), next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


@dataclass
class Stranger:
    """Attacks `addresses` from threads. `answers` are what he was told, `connections` counts those that he made."""

    addresses: list[Address]
    answers: set[bytes] = field(default_factory=set)
    connections: int = 0
    slow: list[float] = field(default_factory=list)  # seconds until a connection was closed that went on byte by byte
    _over: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Stranger:
        for act in (self._flood, self._talk, self._dawdle):
            self._threads.append(threading.Thread(target=self._repeat, args=(act,), daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _repeat(self, act: Callable[[], None]) -> None:
        while not self._over.is_set():
            with suppress(OSError):  # the job may have ended, or a host of it be busy
                act()

    def _connected(self, address: Address) -> socket.socket:
        sock = socket.create_connection(address, 2.0)
        self.connections += 1
        return sock

    def _flood(self) -> None:
        """Opens very many connections, and keeps them."""
        held: deque[socket.socket] = deque()
        try:
            while not self._over.is_set():
                for address in self.addresses:
                    held.append(self._connected(address))
                    if len(held) > _HELD:
                        held.popleft().close()
        finally:
            for sock in held:
                sock.close()

    def _talk(self) -> None:
        """Says what is wrong, and listens."""
        for address in self.addresses:
            for said in SAID:
                with self._connected(address) as sock:
                    answer = bytearray()
                    with suppress(OSError):
                        sock.sendall(said)
                        while part := sock.recv(1000):
                            answer += part
                    self.answers.add(bytes(answer))

    def _dawdle(self) -> None:
        """Says an answer byte by byte."""
        for address in self.addresses:
            began = time.monotonic()
            with self._connected(address) as sock, suppress(OSError):
                for _ in range(70):
                    sock.sendall(b"\0")
                    if self._over.wait(0.3):
                        return
            self.slow.append(time.monotonic() - began)
