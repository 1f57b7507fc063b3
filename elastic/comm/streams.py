"""Byte streams between two processes: a plain socket, or TLS 1.3 over one. Both are non-blocking, and links use them alike.

TLS is Python's `ssl` over memory. One lock serves both directions, since OpenSSL's object is not made for two threads; nothing blocks under
it. Sending encrypts a few records at a time and hands them to the kernel: what was encrypted is *taken*, even while it is `unsent`.
Receiving decrypts straight into the receiver's memory. Bytes that were read from the socket and not asked for yet are `buffered`: the
kernel does not announce them again.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Protocol, cast

from elastic.comm.sockets import SCARCE
from elastic.errors import LinkError
from elastic.memory import raw

_RECORD_BYTES = 16 << 10
_CHUNK_BYTES = 128 << 10
"""How much is encrypted before the kernel gets it, and read from the kernel before it is decrypted."""


class TlsRefused(LinkError):
    """One side does not accept the other's certificate, or what it got is no TLS."""


class Stream(Protocol):
    """A connection. `recv_into` and `sendmsg` do what a non-blocking socket's do; `sendmsg` takes fewer bytes than it is given only if the
    kernel has no room for more."""

    sock: socket.socket

    @property
    def unsent(self) -> bool:
        """Whether bytes were taken that the kernel does not have yet: `flush` hands them over."""
        ...

    @property
    def buffered(self) -> bool:
        """Whether there are bytes to receive that the kernel no longer announces."""
        ...

    def recv_into(self, buffer: memoryview, /) -> int: ...
    def sendmsg(self, views: Sequence[memoryview], /) -> int: ...
    def flush(self) -> bool:
        """Hands unsent bytes to the kernel. Returns whether it has all. Raises OSError if the connection is gone."""
        ...


class PlainStream:
    """A socket as it is."""

    unsent = buffered = False

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.recv_into = sock.recv_into
        self.sendmsg = sock.sendmsg

    def flush(self) -> bool:
        return True


class TlsStream:
    """TLS over a connected socket, which stays the caller's to watch and close. Call `handshake` until it returns."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool) -> None:
        self.sock = sock
        self._lock = threading.Lock()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._encrypted = raw.view(b"")  # what the kernel had no room for
        self._room = raw.room(_CHUNK_BYTES)
        self._record = raw.room(_RECORD_BYTES)

    def handshake(self) -> None:
        """Does the next part of TLS's handshake; returns once it is complete.

        Raises BlockingIOError while the other side has not answered, TlsRefused if there is no trust, OSError if the connection is gone.
        """
        while True:
            try:
                self._tls.do_handshake()
                self._hand_over()
                return
            except ssl.SSLWantReadError:
                self._hand_over()
                if not self._fetch():
                    raise ConnectionResetError("the other side hung up during TLS's handshake") from None
            except ssl.SSLError as error:
                with suppress(OSError):  # the other side shall know why
                    self._hand_over()
                raise refused(error) from error

    def certificate(self) -> bytes:
        """The other side's certificate, DER."""
        return self._tls.getpeercert(binary_form=True) or b""

    @property
    def unsent(self) -> bool:
        return bool(self._encrypted)

    @property
    def buffered(self) -> bool:
        with self._lock:
            return self._incoming.pending > 0 or self._tls.pending() > 0

    def recv_into(self, buffer: memoryview, /) -> int:
        filled = 0
        with self._lock:
            while filled < len(buffer):
                try:
                    count = cast(int, self._tls.read(len(buffer) - filled, buffer[filled:]))
                except ssl.SSLWantReadError:
                    if filled:
                        break
                    if not self._fetch():
                        return 0
                    continue
                except ssl.SSLZeroReturnError:
                    break
                if not count:
                    break
                filled += count
        return filled

    def sendmsg(self, views: Sequence[memoryview], /) -> int:
        with self._lock:
            if not self._hand_over():
                raise BlockingIOError
            taken = 0
            for record in _records(views, self._record):
                self._tls.write(record)
                taken += len(record)
                if self._outgoing.pending >= _CHUNK_BYTES and not self._hand_over():
                    break
            self._hand_over()
        return taken

    def flush(self) -> bool:
        with self._lock:
            return self._hand_over()

    def _fetch(self) -> int:
        """Reads what has arrived at the socket; returns 0 at its end. Raises BlockingIOError if there is nothing."""
        count = self.sock.recv_into(self._room)
        if count:
            self._incoming.write(self._room[:count])
        return count

    def _hand_over(self) -> bool:
        """Hands what is encrypted to the kernel. Returns whether it took all: it may have no room or no memory for now."""
        while self._encrypted or self._outgoing.pending:
            if not self._encrypted:
                self._encrypted = raw.view(self._outgoing.read())
            try:
                self._encrypted = self._encrypted[self.sock.send(self._encrypted) :]
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno in SCARCE:
                    return False
                raise
        return True


def refused(error: ssl.SSLError) -> TlsRefused:
    """Returns the error of a link whose TLS failed."""
    if isinstance(error, ssl.SSLCertVerificationError):
        what = f"the other side's certificate is not accepted ({error.verify_message})"
    elif "ALERT" in (error.reason or ""):
        what = f"the other side does not accept this one's certificate ({error.reason})"
    else:
        what = f"what the other side sends is not the TLS that was expected ({error.reason or error})"
    return TlsRefused(f"{what}: all hosts of a job need certificates from its secret, or all from the same authority")


def _records(views: Sequence[memoryview], room: memoryview) -> Iterator[memoryview]:
    """Yields the bytes in pieces for one TLS record each. Only pieces that would be smaller are copied, to `room`."""
    gathered = 0
    for view in views:
        start = 0
        while start < len(view):
            left = len(view) - start
            if not gathered and left >= len(room):
                yield view[start : start + len(room)]
                start += len(room)
                continue
            part = min(left, len(room) - gathered)
            room[gathered : gathered + part] = view[start : start + part]
            gathered, start = gathered + part, start + part
            if gathered == len(room):
                yield room
                gathered = 0
    if gathered:
        yield room[:gathered]
