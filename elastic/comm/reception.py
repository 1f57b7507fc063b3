"""Where links come from: listening sockets, dialling, and the handshakes under way."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable

from elastic.comm.handshake import Greeting, Handshake
from elastic.comm.reactor import READABLE, Reactor
from elastic.errors import LinkError, PeerLost

_BACKLOG = 4096
_GREETING_S = 10.0
_BUFFER_BYTES = 4 << 20
_KEEPALIVE = {
    socket.TCP_NODELAY: 1,
    socket.TCP_KEEPIDLE: 2,
    socket.TCP_KEEPINTVL: 1,
    socket.TCP_KEEPCNT: 3,
    # A host that vanished with data under way; a stopped worker keeps acknowledging for longer than its agent lets it live.
    socket.TCP_USER_TIMEOUT: 20_000,
}


class Reception:
    """Accepts and dials. `connected(socket, peer, latency_s)` and `refused(peer, error)` are called on the I/O thread."""

    def __init__(
        self,
        reactor: Reactor,
        *,
        worker: int,
        secret: bytes,
        interface: str | None,
        connected: Callable[[socket.socket, int, float | None], None],
        refused: Callable[[int, LinkError], None],
    ) -> None:
        self.rejected = 0
        self._reactor = reactor
        self._worker = worker
        self._secret = secret
        self._connected = connected
        self._refused = refused
        self._greetings: set[Greeting] = set()
        self._dialling: set[int] = set()
        name = f"@elastic-{secrets.token_hex(12)}"
        self._listeners = [_listening(socket.AF_UNIX, _unix(name))]
        parts = [f"unix:{name}"]
        if interface is not None:
            listener = _listening(_family(interface), (interface, 0))
            self._listeners.append(listener)
            parts.append(f"tcp:{interface}:{listener.getsockname()[1]}")
        self.address = ",".join(parts)
        for listener in self._listeners:
            reactor.add(listener.fileno(), READABLE, lambda _events, listener=listener: self._accept(listener))

    def dialling(self, peer: int) -> bool:
        """Whether a handshake with this peer, begun at this end, is under way; false only after `connected` or `refused`."""
        return peer in self._dialling

    def dial(self, peer: int, address: str, *, local: bool) -> None:
        """Begins to make a link to a peer, over UNIX if `local`. Raises PeerLost if nobody listens there any more."""
        family, target = _target(peer, address, local=local)
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            sock.connect(target)
        except BlockingIOError:
            # Under way (TCP): the handshake begins with the peer's challenge, or with the error.
            pass
        except OSError as error:
            sock.close()
            raise PeerLost(f"worker {peer} cannot be reached at {address}: {error.strerror}", peer=peer) from error
        self._dialling.add(peer)
        self._greet(sock, Handshake(secret=self._secret, worker=self._worker, peer=peer), f"worker {peer} at {address}")

    def probe(self, peer: int, address: str, *, local: bool) -> None:
        """Raises PeerLost if it is certain that nobody listens at that address of this host any more."""
        family, target = _target(peer, address, local=local)
        if family is not socket.AF_UNIX:
            return
        with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as sock:
            try:
                sock.connect(target)
            except ConnectionRefusedError as error:
                raise PeerLost(f"worker {peer} is gone: nobody listens at {address}", peer=peer) from error
            except BlockingIOError:
                return

    def close(self) -> None:
        """Closes the listening sockets and abandons the handshakes under way; the reactor must have stopped."""
        for listener in self._listeners:
            listener.close()
        for greeting in self._greetings:
            greeting.sock.close()

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        sock.setblocking(False)
        self._greet(sock, Handshake(secret=self._secret, worker=self._worker, peer=None), None)

    def _greet(self, sock: socket.socket, handshake: Handshake, whom: str | None) -> None:
        _tune(sock)

        def done(sock: socket.socket, peer: int) -> None:
            self._greetings.discard(greeting)
            self._reactor.remove(sock.fileno())
            self._connected(sock, peer, None if greeting.round_trip_s is None else greeting.round_trip_s / 2)
            if whom is not None:
                self._dialling.discard(peer)

        def failed(error: LinkError) -> None:
            self._greetings.discard(greeting)
            self._reactor.remove(sock.fileno())
            sock.close()
            if whom is None:
                # A peer that only looks whether this worker is there hangs up too.
                self.rejected += not isinstance(error, PeerLost)
            elif error.peer is not None:
                self._refused(error.peer, type(error)(f"no handshake with {whom}: {error}", peer=error.peer))
                self._dialling.discard(error.peer)

        greeting = Greeting(sock, handshake, done=done, failed=failed)
        self._greetings.add(greeting)
        self._reactor.add(sock.fileno(), READABLE, greeting.on_event)
        self._reactor.call_after(_GREETING_S, greeting.expire)
        greeting.open()


def _listening(family: socket.AddressFamily, target: str | bytes | tuple[str, int]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    sock.bind(target)
    sock.listen(_BACKLOG)
    return sock


def _target(peer: int, address: str, *, local: bool) -> tuple[socket.AddressFamily, bytes | tuple[str, int]]:
    """What to connect to for an address such as `unix:@NAME,tcp:IP:PORT`."""
    parts = dict(part.split(":", 1) for part in address.split(",") if ":" in part)
    if local and "unix" in parts:
        return socket.AF_UNIX, _unix(parts["unix"])
    ip, _, port = parts.get("tcp", "").rpartition(":")
    if not port.isdigit():
        raise LinkError(f"worker {peer} is on another host and has no address for it: {address}", peer=peer)
    return _family(ip), (ip, int(port))


def _family(ip: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in ip else socket.AF_INET


def _unix(name: str) -> bytes:
    # The abstract namespace: nothing on disk to leave behind.
    return b"\0" + name[1:].encode()


def _tune(sock: socket.socket) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
    if sock.family is not socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
