"""Links between the agents of a job: TCP connections, authenticated by the job's secret, that carry JSON lines and a regular sign of life.
With `--tls` they are encrypted.

An agent that has been silent for SILENT_S is as lost as one whose connection ended: its host vanished, the network split, or it is stopped.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import socket
import time
from collections.abc import Callable

from elastic.agent.loop import Loop
from elastic.agent.stream_channel import StreamChannel
from elastic.comm.greeting import Greeting
from elastic.comm.handshake import Handshake
from elastic.comm.sockets import listen_tcp, stream, tune
from elastic.comm.streams import Stream
from elastic.comm.tls import Tls
from elastic.errors import LinkError
from elastic.host.channel import Message

BEAT_S = 0.25
SILENT_S = 2.0
_GREETING_S = 5.0
DIAL_S = 1.0  # the agent that is dialled may have vanished, and another be the coordinator by then
_AT_ONCE = 32  # connections accepted in one turn of the loop
_WAITING = 64  # connections that have not proven anything yet; for another one the oldest is closed
_ACCEPTOR, _DIALER = 0xFFFFFFFE, 0xFFFFFFFF  # no worker has these numbers
_ALIVE: Message = {"type": "alive"}

Address = tuple[str, int]


def secret_of(job: bytes, agent: str) -> bytes:
    """Returns the secret of links that `agent` accepts: a proof for another agent, or for a worker, is none for this one."""
    return hmac.new(job, b"links to agent " + agent.encode(), hashlib.sha256).digest()


class NobodyListens(LinkError):
    """The other machine says that no process listens at the address."""


class AgentLink:
    """One connection to another agent. `heard` gets its messages, `lost` once a sentence when the connection ends or is silent.

    Silence is counted in this agent's own beats: if both were stopped for a while, neither takes the other for lost. Nothing is called
    back after `close`.
    """

    def __init__(self, loop: Loop, stream: Stream, *, heard: Callable[[Message], None], lost: Callable[[str], None]) -> None:
        self.heard, self.lost = heard, lost
        self.closed = False
        self.silent = False  # whether it was lost since the other side was silent: that one may still be there
        self._loop = loop
        self._channel = StreamChannel(stream)
        self._name = f"agent link {stream.sock.fileno()}"
        self._silent_beats = 0
        self.heard_at = time.monotonic()  # when the other side was heard last
        tune(stream.sock)
        self._watch()
        if stream.buffered:  # the other side spoke at once
            loop.post(self._act)
        self._beat()

    def send(self, message: Message) -> None:
        """Queues a message; it is dropped if the link is closed."""
        if not self.closed:
            self._channel.send(message)
            self._watch()

    def send_line(self, line: bytes) -> None:
        """Queues a message that was encoded once for many links, otherwise like `send`."""
        if not self.closed:
            self._channel.send_line(line)
            self._watch()

    def close(self) -> None:
        """Sends what the kernel takes at once, and closes the connection."""
        if not self.closed:
            self.closed = True
            self._loop.clear_timer(self._name)
            self._loop.forget(self._channel)
            self._channel.flush()
            self._channel.close()

    def _watch(self) -> None:
        self._loop.watch(self._channel, self._act, writable=self._channel.unsent)

    def _act(self) -> None:
        if self.closed:
            return
        self._channel.flush()
        for message in self._channel.receive():
            self._alive()
            if message["type"] != _ALIVE["type"] and not self.closed:
                self.heard(message)
        if self.closed:
            return
        if self._channel.closed:
            self._lose("its connection ended")
        else:
            self._alive()  # part of a long message
            self._watch()

    def _alive(self) -> None:
        self._silent_beats, self.heard_at = 0, time.monotonic()

    def _beat(self) -> None:
        if self._silent_beats * BEAT_S >= SILENT_S:
            self.silent = True
            self._lose(f"it has been silent for {SILENT_S:g} s")
            return
        self._silent_beats += 1
        self.send(_ALIVE)
        self._loop.set_timer(BEAT_S, self._beat, self._name)

    def _lose(self, why: str) -> None:
        self.close()
        self.lost(why)


class AgentListener:
    """Accepts other agents of the job at a free port of `interface`, with TLS if `tls` is given.

    `connected` gets a stream and becomes its owner; without it (this agent does not coordinate) connections are closed.
    """

    def __init__(self, loop: Loop, secret: bytes, interface: str, tls: Tls | None = None) -> None:
        self._loop, self._secret, self._tls = loop, secret, tls
        self.connected: Callable[[Stream], None] | None = None
        self._sock, _ = listen_tcp(interface)
        self.address: Address = (interface, self._sock.getsockname()[1])
        self._greeting: dict[socket.socket, Greeting] = {}  # in order of age
        loop.watch(self._sock, self._accept)

    def close(self) -> None:
        self._loop.forget(self._sock)
        self._sock.close()
        for sock in list(self._greeting):
            self._drop(sock)

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                sock, _ = self._sock.accept()
            except OSError:  # it is gone again, or descriptors are scarce
                return
            if len(self._greeting) >= _WAITING:
                self._relieve()
            sock.setblocking(False)
            shake = Handshake(secret=self._secret, worker=_ACCEPTOR, peer=None, encrypted=self._tls is not None)
            greeting = _greet(self._loop, sock, shake, self._tls, self._done, lambda _, sock=sock: self._drop(sock))
            if not greeting.over:
                self._greeting[sock] = greeting

    def _relieve(self) -> None:
        """Closes the oldest connection that has not proven the secret, or the oldest: a genuine one takes milliseconds, and is repeated."""
        greetings = self._greeting.values()
        next((each for each in greetings if not each.proven), next(iter(greetings))).expire()

    def _done(self, stream: Stream) -> None:
        self._greeting.pop(stream.sock, None)
        if self.connected is None:
            stream.sock.close()
        else:
            self.connected(stream)

    def _drop(self, sock: socket.socket) -> None:
        self._greeting.pop(sock, None)
        self._loop.clear_timer(_timer(sock))
        self._loop.forget(sock)
        sock.close()


def dial(
    loop: Loop,
    secret: bytes,
    address: Address,
    connected: Callable[[Stream], None],
    failed: Callable[[LinkError], None],
    *,
    tls: Tls | None = None,
    either: bool = False,
    limit_s: float = DIAL_S,
) -> Callable[[], None]:
    """Connects to another agent within `limit_s`, with TLS if `tls` is given; calls back once.

    Returns a function that gives up, after which nothing is called back. With `either` the other agent decides whether `tls` is used."""
    sock = stream(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    shake = Handshake(secret=secret, worker=_DIALER, peer=_ACCEPTOR, encrypted=None if either else tls is not None)
    over: list[bool] = []

    def drop() -> None:
        if not over:
            over.append(True)
            loop.clear_timer(_timer(sock))
            loop.forget(sock)
            sock.close()

    def fail(error: LinkError) -> None:
        if not over:
            drop()
            failed(error)

    def done(ready: Stream) -> None:
        over.append(True)
        connected(ready)

    def reached() -> None:
        if over:
            return
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            fail(_refused(code))
            return
        loop.forget(sock)
        _greet(loop, sock, shake, tls, done, fail)

    try:
        sock.connect(address)
    except BlockingIOError:
        pass
    except OSError as error:
        refused = _refused(error.errno or 0)
        loop.post(lambda: fail(refused))
        return drop
    loop.watch(sock, reached, writable=True)
    loop.set_timer(limit_s, lambda: fail(LinkError(f"no answer for {limit_s:g} s")), _timer(sock))
    return drop


def _refused(code: int) -> LinkError:
    kind = NobodyListens if code == errno.ECONNREFUSED else LinkError
    return kind(os.strerror(code))


def _timer(sock: socket.socket) -> str:
    return f"greeting {sock.fileno()}"


def _greet(
    loop: Loop,
    sock: socket.socket,
    shake: Handshake,
    tls: Tls | None,
    done: Callable[[Stream], None],
    failed: Callable[[LinkError], None],
) -> Greeting:
    name = _timer(sock)

    def finished(ready: Stream, _: int) -> None:
        loop.clear_timer(name)
        loop.forget(sock)
        done(ready)

    def ended(error: LinkError) -> None:
        loop.clear_timer(name)
        failed(error)

    greeting = Greeting(sock, shake, done=finished, failed=ended, tls=tls)
    loop.watch(sock, lambda: greeting.on_event(0))
    loop.set_timer(_GREETING_S, greeting.expire, name)
    greeting.open()
    return greeting
