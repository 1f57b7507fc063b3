"""Runs the handshake of a new connection on its non-blocking socket, and TLS's if the job's links between hosts are encrypted:

    challenge by the secret -> TLS's handshake -> the challenge again, inside TLS, with a secret that is bound to both certificates

So nobody without the secret reaches OpenSSL, and nobody can stand in between, whatever certificate he has.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Callable

from elastic.comm.handshake import Handshake
from elastic.comm.streams import PlainStream, Stream, TlsStream, refused
from elastic.comm.tls import Tls
from elastic.errors import LinkError, PeerLost
from elastic.memory.raw import room, view

_LONGEST_BYTES = 256  # at least that of each part of a handshake


class HungUp(PeerLost):
    """The other side ended the connection before anything was proven, without refusing it."""


class Greeting:
    """A handshake on a non-blocking socket. Calls `done(stream, peer)` or `failed(error)` once; `done` takes the socket over.

    `tls` is needed if `handshake` may be encrypted. `proven`: the other side has the secret. `round_trip_s` is the time that it took for
    its first answer.
    """

    def __init__(
        self,
        sock: socket.socket,
        handshake: Handshake,
        *,
        done: Callable[[Stream, int], None],
        failed: Callable[[LinkError], None],
        tls: Tls | None = None,
    ) -> None:
        self.sock = sock
        self.over = self.proven = False
        self.round_trip_s: float | None = None
        self._sent_at: float | None = None
        self._handshake = handshake
        self._tls = tls
        self._stream: Stream = PlainStream(sock)
        self._securing: TlsStream | None = None  # while TLS's handshake is under way
        self._room = room(_LONGEST_BYTES)
        self._received = 0
        self._done = done
        self._failed = failed

    def open(self) -> None:
        """Sends the opening of this side, if it has one."""
        self._attempt(self._begin)

    def on_event(self, _events: int) -> None:
        """Reads what has arrived at the socket, and continues the handshake."""
        self._attempt(self._advance)

    def expire(self) -> None:
        """Fails the handshake because the other side took too long."""
        self._fail(LinkError("no answer in time", peer=self._handshake.peer))

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            if not self.over:
                action()
        except BlockingIOError:
            return
        except LinkError as error:
            self._refuse(error)
        except ssl.SSLError as error:
            self._fail(refused(error))
        except OSError as error:
            kind = HungUp if isinstance(error, ConnectionResetError | BrokenPipeError) else PeerLost
            self._fail(kind(error.strerror or str(error), peer=self._handshake.peer))

    def _begin(self) -> None:
        if self._handshake.opening:
            self._send(self._handshake.opening)

    def _advance(self) -> None:
        while not self.over:
            if self._securing is not None:
                self._securing.handshake()
                self._go_inside(self._securing)
            elif self._handshake.expected:
                if not self._receive():
                    return
            elif self._handshake.encrypted and self._tls is not None:
                self.proven = True
                self._securing = self._tls.stream(self.sock, dials=self._handshake.dials)
            elif self._handshake.peer is not None:
                self.over = True
                self._done(self._stream, self._handshake.peer)

    def _go_inside(self, stream: TlsStream) -> None:
        """Begins the challenge inside TLS."""
        tls, outer = self._tls, self._handshake
        assert tls is not None
        self._stream, self._securing = stream, None
        self._handshake = outer.inside(lambda secret: tls.bound(secret, stream, dials=outer.dials))
        self._begin()

    def _receive(self) -> bool:
        """Reads once, and answers a part that is whole. Returns False at the end of the connection."""
        expected = self._handshake.expected
        count = self._stream.recv_into(self._room[self._received : expected])
        if not count:
            self._fail(HungUp("the other side hung up", peer=self._handshake.peer))
            return False
        self._received += count
        if self._received == expected:
            if self._sent_at is not None and self.round_trip_s is None:
                self.round_trip_s = time.perf_counter() - self._sent_at
            self._received = 0
            self._send(self._handshake.feed(bytes(self._room[:expected])))
        return True

    def _send(self, data: bytes) -> None:
        if not data:
            return
        self._sent_at = time.perf_counter()
        # A new socket has room for these few bytes; if not, the other side does not follow this protocol.
        if self._stream.sendmsg([view(data)]) != len(data) or self._stream.unsent:
            raise LinkError("the socket has no room for a handshake")

    def _refuse(self, error: LinkError) -> None:
        # An error here does not matter: the other side no longer waits for an answer.
        if self._handshake.refusal:
            with contextlib.suppress(OSError):
                self._stream.sendmsg([view(self._handshake.refusal)])
        self._fail(error)

    def _fail(self, error: LinkError) -> None:
        if not self.over:
            self.over = True
            self._failed(error)
