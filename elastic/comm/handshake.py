"""The mutual challenge by which two workers prove to each other that they have the job's secret.

    acceptor -> dialer    magic, nonce A
    dialer -> acceptor    dialer, acceptor (worker ids), nonce D, HMAC-SHA256(secret, "dialer", A, D, ids)
    acceptor -> dialer    HMAC-SHA256(secret, "acceptor", A, D, ids)

`Handshake` decides, without a socket; `Greeting` runs it on a non-blocking one. Every part has a fixed size, and neither side continues
before it has verified the other, so no byte of the first message can be read as part of the handshake. An acceptor that refuses sends zeros
as its proof, so that a dialer can distinguish a refusal from a peer that died.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import socket
import struct
import time
from collections.abc import Callable

from elastic.errors import LinkError, PeerLost

_MAGIC = b"elastic1"
_NONCE_BYTES = 32
_PROOF_BYTES = hashlib.sha256().digest_size
_IDS = struct.Struct("<II")


class HungUp(PeerLost):
    """The other side ended the connection before anything was proven, without refusing it."""


class WrongSecret(LinkError):
    """The other side has not proven that it has the same secret."""


class Handshake:
    """One side of the challenge. `peer` is the worker to dial, or None to accept any worker of the job.

    `expected` is the number of bytes to read next, 0 when done; then `peer` is the verified id of the other side.
    """

    def __init__(self, *, secret: bytes, worker: int, peer: int | None) -> None:
        self.peer = peer
        self.opening = b""
        self.refusal = b""
        self._secret = secret
        self._worker = worker
        self._nonces = b""
        self._ids = b""
        if peer is None:
            self._nonces = secrets.token_bytes(_NONCE_BYTES)
            self.opening = _MAGIC + self._nonces
            self.refusal = bytes(_PROOF_BYTES)
            self.expected = _IDS.size + _NONCE_BYTES + _PROOF_BYTES
            self._step = self._verify_dialer
        else:
            self.expected = len(_MAGIC) + _NONCE_BYTES
            self._step = self._answer_challenge

    def feed(self, received: bytes) -> bytes:
        """Takes `expected` bytes of the other side, returns the bytes to send. Raises LinkError if they are no valid proof."""
        return self._step(received)

    def _answer_challenge(self, received: bytes) -> bytes:
        if received[: len(_MAGIC)] != _MAGIC or self.peer is None:
            raise LinkError("the other side does not speak this protocol", peer=self.peer)
        nonce = secrets.token_bytes(_NONCE_BYTES)
        self._nonces = received[len(_MAGIC) :] + nonce
        self._ids = _IDS.pack(self._worker, self.peer)
        self.expected = _PROOF_BYTES
        self._step = self._verify_acceptor
        return self._ids + nonce + self._proof(b"dialer")

    def _verify_dialer(self, received: bytes) -> bytes:
        self._ids, nonce, proof = received[: _IDS.size], received[_IDS.size : -_PROOF_BYTES], received[-_PROOF_BYTES:]
        self._nonces += nonce
        dialer, acceptor = _IDS.unpack(self._ids)
        self._require(proof, b"dialer")
        if acceptor != self._worker:
            raise LinkError(f"worker {dialer} dialled worker {acceptor}, but this is worker {self._worker}", peer=dialer)
        self.peer = dialer
        self.expected = 0
        return self._proof(b"acceptor")

    def _verify_acceptor(self, received: bytes) -> bytes:
        self._require(received, b"acceptor")
        self.expected = 0
        return b""

    def _proof(self, role: bytes) -> bytes:
        return hmac.new(self._secret, role + self._nonces + self._ids, hashlib.sha256).digest()

    def _require(self, proof: bytes, role: bytes) -> None:
        if not hmac.compare_digest(proof, self._proof(role)):
            raise WrongSecret("the other side has another secret, or is not the expected worker", peer=self.peer)


class Greeting:
    """A handshake on a non-blocking socket. Calls `done(socket, peer)` or `failed(error)` once; `done` takes the socket over.

    `round_trip_s` is the time the other side took for its last answer.
    """

    def __init__(
        self, sock: socket.socket, handshake: Handshake, *, done: Callable[[socket.socket, int], None], failed: Callable[[LinkError], None]
    ) -> None:
        self.sock = sock
        self.over = False
        self.round_trip_s: float | None = None
        self._sent_at: float | None = None
        self._handshake = handshake
        self._received = b""
        self._done = done
        self._failed = failed

    def open(self) -> None:
        """Sends the opening of this side, if it has one."""
        if self._handshake.opening:
            self._attempt(lambda: self._send(self._handshake.opening))

    def on_event(self, _events: int) -> None:
        """Reads from the socket, which is readable, and continues the handshake."""
        self._attempt(self._advance)
        if not self.over and self._handshake.expected == 0 and self._handshake.peer is not None:
            self.over = True
            self._done(self.sock, self._handshake.peer)

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
        except OSError as error:
            kind = HungUp if isinstance(error, ConnectionResetError | BrokenPipeError) else PeerLost
            self._fail(kind(error.strerror or str(error), peer=self._handshake.peer))

    def _advance(self) -> None:
        part = self.sock.recv(self._handshake.expected - len(self._received))
        if not part:
            self._fail(HungUp("the other side hung up", peer=self._handshake.peer))
            return
        self._received += part
        if len(self._received) < self._handshake.expected:
            return
        if self._sent_at is not None:
            self.round_trip_s = time.perf_counter() - self._sent_at
        received, self._received = self._received, b""
        self._send(self._handshake.feed(received))

    def _send(self, data: bytes) -> None:
        self._sent_at = time.perf_counter()
        # A new socket has room for these few bytes; if not, the other side does not follow this protocol.
        if self.sock.send(data) != len(data):
            raise LinkError("the socket has no room for a handshake")

    def _refuse(self, error: LinkError) -> None:
        # An error here does not matter: the other side no longer waits for an answer.
        with contextlib.suppress(OSError):
            self.sock.send(self._handshake.refusal)
        self._fail(error)

    def _fail(self, error: LinkError) -> None:
        if not self.over:
            self.over = True
            self._failed(error)
