"""Makes links: listening sockets, dialling, and handshakes.

No action of an unauthenticated peer, and no lack of descriptors or memory, raises an exception on the I/O thread: a connection that cannot
be served is closed, a listener that cannot accept pauses for a moment, and a dialer retries until its deadline, unless its peer is gone.
"""

from __future__ import annotations

import errno
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from elastic.comm import sockets
from elastic.comm.admission import GREETING_S, Admission, room
from elastic.comm.greeting import Greeting, HungUp
from elastic.comm.handshake import Handshake
from elastic.comm.reactor import READABLE, Reactor
from elastic.comm.streams import Stream
from elastic.comm.tls import Tls
from elastic.errors import LinkError, PeerLost

_REST_S = 0.05
_AGAIN_S = 0.02
_TRANSIENT = sockets.SCARCE | {errno.EAGAIN, errno.EADDRNOTAVAIL, errno.ENOENT, errno.EINTR}
"""Errors of a connection whose peer may be alive: it is busy, has no descriptors, or has not made its socket file again yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dial:
    """A link to make, and the deadline for it. `address` is for messages only."""

    peer: int
    address: str
    family: socket.AddressFamily
    target: sockets.SocketAddress | Path
    deadline: float


class Reception:
    """Accepts and dials, over TCP with TLS if `tls` is given. `connected(stream, peer, latency_s)` and `refused(peer, error)` are called
    on the I/O thread."""

    def __init__(
        self,
        reactor: Reactor,
        *,
        worker: int,
        secret: bytes,
        directory: Path | None,
        interface: str | None,
        connected: Callable[[Stream, int, float | None], None],
        refused: Callable[[int, LinkError], None],
        tls: Tls | None = None,
    ) -> None:
        self.rejected = 0
        self.admission = Admission(reactor, room())
        self._reactor = reactor
        self._worker = worker
        self._secret = secret
        self._tls = tls
        self._connected = connected
        self._refused = refused
        self._dialling: set[int] = set()
        self._closed = False
        self._listeners: list[socket.socket] = []
        self._local, part, self._file = sockets.listen_unix(directory, f"{worker}-{secrets.token_hex(4)}")
        parts = [part]
        self._listen(self._local)
        if interface is not None:
            listener, part = sockets.listen_tcp(interface)
            parts.append(part)
            self._listen(listener)
        self.address = ",".join(parts)

    def dialling(self, peer: int) -> bool:
        """Whether a handshake with this peer, started at this end, is in progress; false only after `connected` or `refused`."""
        return peer in self._dialling

    def dial(self, peer: int, address: str, *, local: bool) -> None:
        """Begins to make a link to a peer, over a UNIX socket if `local`. Raises PeerLost if no process listens there any more."""
        family, target = sockets.target_of(peer, address, local=local)
        self._dialling.add(peer)
        try:
            self._connect(Dial(peer=peer, address=address, family=family, target=target, deadline=time.monotonic() + GREETING_S))
        except LinkError:
            self._dialling.discard(peer)
            raise

    def probe(self, peer: int, address: str, *, local: bool) -> None:
        """Raises PeerLost if certainly no process listens at that address of this host any more."""
        family, target = sockets.target_of(peer, address, local=local)
        if family is not socket.AF_UNIX:
            return
        try:
            with sockets.stream(family) as sock:
                sockets.connect(sock, target)
        except ConnectionRefusedError as error:
            raise PeerLost(f"worker {peer} is gone: no process listens at {address}", peer=peer) from error
        except OSError:
            return  # it may be busy, or has not made its socket file again yet

    def renew(self) -> None:
        """Makes this worker's socket file again if it was removed, on the I/O thread, so that dialers find it."""
        if self._file is not None:
            self._reactor.call_after(0.0, self._renew)

    def close(self) -> None:
        """Closes the listening sockets and those of handshakes in progress; the reactor must have stopped."""
        self._closed = True
        for listener in self._listeners:
            listener.close()
        for greeting in self.admission:
            greeting.sock.close()

    # --- accepting

    def _listen(self, listener: socket.socket) -> None:
        self._listeners.append(listener)
        self._reactor.add(listener.fileno(), READABLE, lambda _events: self._accept(listener))

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # No descriptors or memory; or an error of that connection, which accept(2) returns.
            if error.errno in sockets.SCARCE:
                self.admission.relieve()
            self._rest(listener)
            return
        sock.setblocking(False)
        if not sockets.of_this_user(sock):
            self.rejected += 1
            sock.close()
            return
        self._greet(sock, self._handshake(sock, None), None)

    def _rest(self, listener: socket.socket) -> None:
        """Pauses a listener for a moment: an immediate retry would fail again."""

        def wake() -> None:
            if listener in self._listeners:
                self._reactor.modify(listener.fileno(), READABLE)

        self._reactor.modify(listener.fileno(), 0)
        self._reactor.call_after(_REST_S, wake)

    def _renew(self) -> None:
        if self._closed or self._file is None or self._file.exists():
            return
        with suppress(OSError):  # perhaps no space: the next `install` tries again
            fresh = sockets.listen_at(self._file)
            old, self._local = self._local, fresh
            self._listeners.remove(old)
            self._reactor.remove(old.fileno())
            old.close()
            self._listen(fresh)

    # --- dialling

    def _connect(self, dial: Dial) -> None:
        try:
            sock = sockets.stream(dial.family)
        except OSError as error:
            self._put_off(dial, error)
            return
        try:
            sockets.connect(sock, dial.target)
        except OSError as error:
            if error.errno != errno.EINPROGRESS:
                sock.close()
                self._put_off(dial, error)
                return
            # TCP is still connecting: the handshake begins with the peer's challenge, or fails with the error.
        self._greet(sock, self._handshake(sock, dial.peer), dial)

    def _put_off(self, dial: Dial, error: OSError) -> None:
        """Dials again in a moment. Raises PeerLost if the error is permanent, LinkError after the deadline."""
        reason = f"worker {dial.peer} cannot be reached at {dial.address}: {error.strerror or error}"
        if error.errno not in _TRANSIENT:
            raise PeerLost(reason, peer=dial.peer) from error
        if time.monotonic() > dial.deadline:
            raise LinkError(f"{reason} (tried for {GREETING_S:g} s)", peer=dial.peer) from error
        self._reactor.call_after(_AGAIN_S, lambda: self._again(dial))

    def _again(self, dial: Dial) -> None:
        try:
            self._connect(dial)
        except LinkError as error:
            self._give_up(dial, error)

    def _give_up(self, dial: Dial, error: LinkError) -> None:
        self._refused(dial.peer, error)
        self._dialling.discard(dial.peer)

    # --- handshakes

    def _handshake(self, sock: socket.socket, peer: int | None) -> Handshake:
        encrypted = self._tls is not None and sock.family is not socket.AF_UNIX
        return Handshake(secret=self._secret, worker=self._worker, peer=peer, encrypted=encrypted)

    def _greet(self, sock: socket.socket, handshake: Handshake, dial: Dial | None) -> None:
        """Starts the handshake on a connection; `dial` is None if the other side dialled."""

        def done(stream: Stream, peer: int) -> None:
            self.admission.discard(greeting)
            self._reactor.remove(sock.fileno())
            try:
                self._connected(stream, peer, None if greeting.round_trip_s is None else greeting.round_trip_s / 2)
            except OSError as error:  # the kernel has no room for another watched descriptor
                sock.close()
                self._failed(dial, LinkError(error.strerror or str(error), peer=peer))
            else:
                if dial is not None:
                    self._dialling.discard(peer)

        def failed(error: LinkError) -> None:
            self.admission.discard(greeting)
            self._reactor.remove(sock.fileno())
            sock.close()
            self._failed(dial, error)

        greeting = Greeting(sock, handshake, done=done, failed=failed, tls=self._tls)
        self.admission.add(greeting, stranger=dial is None)
        try:
            sockets.tune(sock)
            self._reactor.add(sock.fileno(), READABLE, greeting.on_event)
        except OSError as error:
            self.admission.discard(greeting)
            sock.close()
            self._failed(dial, LinkError(error.strerror or str(error), peer=handshake.peer))
            return
        greeting.open()

    def _failed(self, dial: Dial | None, error: LinkError) -> None:
        if dial is None:
            # A peer's `probe` also connects and hangs up.
            self.rejected += not isinstance(error, PeerLost)
        elif isinstance(error, HungUp) and time.monotonic() < dial.deadline:
            # The peer closed it to make room for others, or it died: then the next dial fails.
            self._reactor.call_after(_AGAIN_S, lambda: self._again(dial))
        else:
            kind = PeerLost if isinstance(error, PeerLost) else LinkError
            self._give_up(dial, kind(f"no handshake with worker {dial.peer} at {dial.address}: {error}", peer=dial.peer))
