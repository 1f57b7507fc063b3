"""The channel between the processes of one host: JSON lines, with file descriptors, over a UNIX stream socket.

A message is one line of JSON. Its field `fds` counts the descriptors sent with it; they arrive in the order of the messages. A `Packed`
value of the message, or of its field `message`, follows the line, and the field `packed` has its place and its length.
"""

from __future__ import annotations

import array
import json
import os
import socket
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from elastic.host.packed import Packed

Message = dict[str, Any]

AGENT_GONE = 70
"""The exit code of a worker that has lost its agent."""

MAPPED = "mapped"
"""The field of a message that names the workers whose segments come with it, in the order of the descriptors."""

_PACKED, _INNER = "packed", "message"
_READ_BYTES = 1 << 18
_MAX_FDS = 253  # the most that Linux passes with one message


class Channel:
    """One end of a connection. `send` never blocks on a non-blocking socket: bytes that the kernel does not take wait for `flush`."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.closed = False  # the other end is gone
        self._incoming = bytearray()
        self._searched = 0  # so many bytes of it hold no end of a line
        self._incomplete: Message | None = None  # a message whose packed value has not arrived
        self._incoming_fds: deque[int] = deque()
        self._outgoing = bytearray()
        self._outgoing_fds: deque[tuple[int, list[int]]] = deque()  # from which byte of the queue on they are sent

    @classmethod
    def adopt(cls, fd: int) -> Channel:
        """Takes over the end of a connection that a parent process left open as descriptor `fd`."""
        sock = socket.socket(fileno=fd)
        sock.set_inheritable(False)
        return cls(sock)

    def fileno(self) -> int:
        return self.sock.fileno()

    @property
    def unsent(self) -> bool:
        return bool(self._outgoing)

    @property
    def waiting(self) -> int:
        """The number of bytes that wait for the other end."""
        return len(self._outgoing)

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Queues one message and sends what fits. A vanished reader is no error here: `receive` detects it. `fds` are duplicated."""
        if fds:
            self._outgoing_fds.append((len(self._outgoing), [os.dup(fd) for fd in fds]))
            self.send_line(encoded({**message, "fds": len(fds)}))
        else:
            self.send_line(encoded(message))

    def send_line(self, line: bytes) -> None:
        """Sends a message that was encoded once for many channels, otherwise like `send`."""
        self._outgoing += line
        self.flush()

    def flush(self) -> None:
        """Sends as much of the queue as the kernel takes."""
        try:
            while self._outgoing:
                sent = self._send_some()
                del self._outgoing[:sent]
                self._outgoing_fds = deque((start - sent, fds) for start, fds in self._outgoing_fds)
        except BlockingIOError:
            return
        except OSError:
            self._drop()

    def _send_some(self) -> int:
        """Sends bytes up to the next descriptors, or these with the bytes behind them; returns the number of bytes."""
        if not self._outgoing_fds:
            return self.sock.send(self._outgoing, socket.MSG_NOSIGNAL)
        start, fds = self._outgoing_fds[0]
        if start > 0:
            return self.sock.send(bytes(self._outgoing[:start]), socket.MSG_NOSIGNAL)
        stop = self._outgoing_fds[1][0] if len(self._outgoing_fds) > 1 else len(self._outgoing)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        sent = self.sock.sendmsg([bytes(self._outgoing[:stop])], rights, socket.MSG_NOSIGNAL)
        self._outgoing_fds.popleft()
        close_all(fds)
        return sent

    def _drop(self) -> None:
        """Drops what could not be sent."""
        self._outgoing.clear()
        for _, fds in self._outgoing_fds:
            close_all(fds)
        self._outgoing_fds.clear()

    def receive(self) -> list[Message]:
        """Reads once and returns the messages that are complete; sets `closed` at the end of the connection.

        Blocks for at least one read on a blocking socket; returns nothing when a non-blocking one has nothing.
        """
        try:
            data = self._read()
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            self.closed = True
            return []
        self._incoming += data
        messages: list[Message] = []
        while (message := self._next()) is not None:
            messages.append(message)
        return messages

    def _next(self) -> Message | None:
        """Returns the next message that has arrived completely. Each byte of a long one is searched and copied once."""
        if self._incomplete is None:
            end = self._incoming.find(b"\n", self._searched)
            if end < 0:
                self._searched = len(self._incoming)
                return None
            self._incomplete = self._decoded(bytes(memoryview(self._incoming)[:end]))
            del self._incoming[: end + 1]
            self._searched = 0
        message, (path, size) = self._incomplete, self._incomplete.get(_PACKED, ((), 0))
        if size > len(self._incoming):
            return None
        self._incomplete = None
        if path:
            *outer, name = path
            place = message[outer[0]] if outer else message
            place[name] = Packed.arrived(bytes(memoryview(self._incoming)[:size]))
            del self._incoming[:size], message[_PACKED]
        return message

    def drain(self) -> list[Message]:
        """Returns all messages that have arrived so far, on a non-blocking socket."""
        messages: list[Message] = []
        while not self.closed:
            size = len(self._incoming)
            batch = self.receive()
            messages += batch
            if not batch and len(self._incoming) == size:
                break
        return messages

    def close(self) -> None:
        """Closes the connection; descriptors that were not sent, or arrived without all of their message, are closed too."""
        self.closed = True
        self._drop()
        close_all(self._incoming_fds)
        self._incoming_fds.clear()
        self.sock.close()

    def _read(self) -> bytes:
        size = array.array("i").itemsize
        data, ancillary, _, _ = self.sock.recvmsg(_READ_BYTES, socket.CMSG_SPACE(_MAX_FDS * size), socket.MSG_CMSG_CLOEXEC)
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(payload[: len(payload) - len(payload) % size])
                self._incoming_fds.extend(fds)
        return data

    def _decoded(self, line: bytes) -> Message:
        message = json.loads(line)
        message["fds"] = [self._incoming_fds.popleft() for _ in range(message.get("fds", 0))]
        return message


def close_all(fds: Iterable[int]) -> None:
    """Closes these descriptors."""
    for fd in fds:
        os.close(fd)


def encoded(message: Message) -> bytes:
    """Encodes a message: a line, and its packed value, if it has one."""
    inner = message.get(_INNER)
    for outer, fields in (((), message), ((_INNER,), inner if isinstance(inner, dict) else {})):
        for name, value in fields.items():
            if isinstance(value, Packed):
                rest = {key: each for key, each in fields.items() if key != name}
                line = {**message, _INNER: rest} if outer else rest
                return json.dumps({**line, _PACKED: [[*outer, name], len(value.data)]}).encode() + b"\n" + value.data
    return json.dumps(message).encode() + b"\n"
