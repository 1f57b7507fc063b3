"""The state of a torchrun rendezvous as one key in etcd, replaced by compare-and-swap."""

from __future__ import annotations

import threading
import time
import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable
from typing import TypeVar

from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousStateError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import RendezvousBackend, Token

from elastic.errors import Conflict, EtcdRefused, EtcdUnavailable
from elastic.membership.etcd import VALUE_BYTES, EtcdClient

T = TypeVar("T")

_RETRY_S = 0.2


class Access:
    """An etcd client that waits through an outage, and whose keys vanish when their writer has been gone for `ttl_s` seconds."""

    def __init__(self, client: EtcdClient, *, patience_s: float, ttl_s: int) -> None:
        self.client = client
        self._patience_s = patience_s
        self._ttl_s = ttl_s
        self._lock = threading.Lock()
        self._lease: int | None = None
        self._renewed_at = 0.0

    def repeated(self, call: Callable[[], T]) -> T:
        """Calls, again while etcd does not answer. What is called may be done twice. Raises RendezvousConnectionError."""
        until = time.monotonic() + self._patience_s
        pause = threading.Event()
        while True:
            try:
                return call()
            except EtcdUnavailable as error:
                if isinstance(error, EtcdRefused) or time.monotonic() >= until:
                    raise RendezvousConnectionError(f"the rendezvous has lost its etcd: {error}") from error
            pause.wait(_RETRY_S)

    def once(self, call: Callable[[], T]) -> T:
        """Calls once, for what must not be done twice. Raises RendezvousConnectionError."""
        try:
            return call()
        except EtcdUnavailable as error:
            raise RendezvousConnectionError(f"the rendezvous has lost its etcd: {error}") from error

    def lease(self) -> int:
        """Returns this process's lease, renewed if a quarter of its time is over. Raises EtcdUnavailable."""
        with self._lock:
            now = time.monotonic()
            if self._lease is not None and now - self._renewed_at > self._ttl_s / 4:
                self._lease = self._lease if self.client.refresh(self._lease) else None
                self._renewed_at = now
            if self._lease is None:
                self._lease, self._renewed_at = self.client.grant(self._ttl_s), now
            return self._lease


class EtcdV3Backend(RendezvousBackend):
    """The backend for torch's `DynamicRendezvousHandler`. A token is the revision at which the key was written."""

    def __init__(self, access: Access, key: str) -> None:
        self._access = access
        self._key = key

    @property
    def name(self) -> str:
        return "etcd-v3"

    def get_state(self) -> tuple[bytes, Token] | None:
        """Returns state and token, None if there is no state. Raises RendezvousConnectionError, RendezvousStateError."""
        found = self._access.repeated(lambda: self._access.client.get(self._key))
        return None if found is None else (_unpacked(found.value or ""), found.mod_revision)

    def set_state(self, state: bytes, token: Token | None = None) -> tuple[bytes, Token, bool] | None:
        """Writes the state if its token is still the given one, or if there is none and none is given. Returns what is there then.

        Raises RendezvousConnectionError, and RendezvousStateError if the state of so many nodes is too large for a key.
        """
        if token is not None and not isinstance(token, int):
            return self._found(state)
        packed = _packed(state)
        try:
            written = self._access.repeated(
                lambda: self._access.client.compare_and_put(self._key, packed, token or 0, lease=self._access.lease())
            )
        except Conflict:
            return self._found(state)
        return state, written, True

    def _found(self, state: bytes) -> tuple[bytes, Token, bool] | None:
        """What is there instead. It may be what was to be written: an attempt that etcd did, and whose answer was lost.

        A state has the time of its node's last heartbeat, so no two are equal.
        """
        found = self.get_state()
        return None if found is None else (*found, found[0] == state)


def _packed(state: bytes) -> str:
    packed = b64encode(zlib.compress(state)).decode()
    if len(packed) > VALUE_BYTES:
        raise RendezvousStateError(
            f"the rendezvous has too many nodes: its state takes {len(packed)} bytes, and a key {VALUE_BYTES} at most"
        )
    return packed


def _unpacked(packed: str) -> bytes:
    try:
        return zlib.decompress(b64decode(packed, validate=True))
    except (ValueError, zlib.error) as error:
        raise RendezvousStateError(
            f"the state of the rendezvous in etcd is not what a backend of this kind has written: {error}"
        ) from error
