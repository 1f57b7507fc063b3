"""The mutual challenge by which two workers prove to each other that they have the job's secret.

    acceptor -> dialer    magic, nonce A
    dialer -> acceptor    dialer, acceptor (worker ids), nonce D, HMAC-SHA256(secret, magic, "dialer", A, D, ids)
    acceptor -> dialer    HMAC-SHA256(secret, magic, "acceptor", A, D, ids)

It decides, without a socket; `greeting.py` runs it on one. Every part has a fixed size, and neither side continues before it has verified
the other, so no byte of the first message can be read as part of the handshake. An acceptor that refuses sends zeros as its proof, so that
a dialer can distinguish a refusal from a peer that died. The magic says whether TLS follows; a dialer that is of another mind hangs up.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from collections.abc import Callable

from elastic.errors import LinkError

_MAGIC = {False: b"elastic2", True: b"elastls2"}
_MAGIC_BYTES = 8
_NONCE_BYTES = 32
_PROOF_BYTES = hashlib.sha256().digest_size
_IDS = struct.Struct("<II")


class Unfit(LinkError):
    """The other side has not proven that it has the same secret, or its links are encrypted and this side's are not, or vice versa.

    Somebody else may have said so, who has taken the other side's place in the network.
    """


class WrongSecret(Unfit):
    """The other side has not proven that it has the same secret."""


class Handshake:
    """One side of the challenge. `peer` is the worker to dial, or None to accept any worker of the job.

    `encrypted` says whether TLS follows; a dialer with None leaves it to the acceptor. `expected` is the number of bytes to read next, 0
    when done; then `peer` is the verified id of the other side.
    """

    def __init__(self, *, secret: bytes, worker: int, peer: int | None, encrypted: bool | None = False) -> None:
        self.peer = peer
        self.encrypted = encrypted
        self.opening = b""
        self.refusal = b""
        self.dials = peer is not None
        self._secret = secret
        self._worker = worker
        self._nonces = b""
        self._ids = b""
        if peer is None:
            self._nonces = secrets.token_bytes(_NONCE_BYTES)
            self.opening = _MAGIC[bool(encrypted)] + self._nonces
            self.refusal = bytes(_PROOF_BYTES)
            self.expected = _IDS.size + _NONCE_BYTES + _PROOF_BYTES
            self._step = self._verify_dialer
        else:
            self.expected = _MAGIC_BYTES + _NONCE_BYTES
            self._step = self._answer_challenge

    def inside(self, bound: Callable[[bytes], bytes]) -> Handshake:
        """Returns the same challenge anew, to be made inside TLS, with the secret that `bound` makes of this one's."""
        return Handshake(secret=bound(self._secret), worker=self._worker, peer=self.peer if self.dials else None)

    def feed(self, received: bytes) -> bytes:
        """Takes `expected` bytes of the other side, returns the bytes to send. Raises LinkError if they are no valid proof."""
        return self._step(received)

    def _answer_challenge(self, received: bytes) -> bytes:
        magic = received[:_MAGIC_BYTES]
        if magic not in _MAGIC.values() or self.peer is None:
            raise LinkError("the other side does not speak this protocol", peer=self.peer)
        encrypted = magic == _MAGIC[True]
        if self.encrypted not in (None, encrypted):
            theirs, ours = ("uses TLS", "does not") if encrypted else ("does not use TLS", "does")
            raise Unfit(f"the other side {theirs}, and this side {ours}: give every host of the job the same --tls", peer=self.peer)
        self.encrypted = encrypted
        nonce = secrets.token_bytes(_NONCE_BYTES)
        self._nonces = received[_MAGIC_BYTES:] + nonce
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
        return hmac.new(self._secret, _MAGIC[bool(self.encrypted)] + role + self._nonces + self._ids, hashlib.sha256).digest()

    def _require(self, proof: bytes, role: bytes) -> None:
        if not hmac.compare_digest(proof, self._proof(role)):
            raise WrongSecret("the other side has another secret, or is not the expected worker", peer=self.peer)
