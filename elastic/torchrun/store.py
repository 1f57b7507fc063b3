"""torch's key-value store on etcd: what the nodes of a rendezvous tell each other, such as the address of rank 0."""

from __future__ import annotations

import threading
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, cast

from torch._C._distributed_c10d import Store
from torch.distributed import DistStoreError
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError

from elastic.errors import Conflict, ElasticError
from elastic.membership.etcd import KeyValue
from elastic.membership.watch import KeyWatch
from elastic.torchrun.backend import Access


class EtcdV3Store(Store):
    """The keys under `prefix`. Waiting for keys is a watch.

    `add`, `append` and `compare_set` are not repeated if etcd's answer was lost, since they must not be done twice.

    Raises RendezvousConnectionError if etcd is lost, DistStoreError if a key is not there in time.
    """

    def __init__(self, access: Access, prefix: str) -> None:
        super().__init__()  # without it torch's trampoline has no object
        self._access = access
        self._prefix = prefix

    def set(self, key: str, value: str | bytes) -> None:
        self._access.repeated(lambda: self._access.client.put(self._prefix + key, _text(value), lease=self._access.lease()))

    def get(self, key: str) -> bytes:
        """Waits until the key is there."""
        found = self._read(key)
        if found is None:
            self.wait([key])
            found = self._read(key)
        if found is None:
            raise DistStoreError(f"the key {key} was deleted while it was read")
        return _bytes(found)

    def add(self, key: str, amount: int) -> int:
        """Adds to a decimal number, which is 0 at first. Returns the sum."""
        return int(self._changed(key, lambda old: str(int(old or b"0") + amount).encode()))

    def append(self, key: str, value: str | bytes) -> None:
        self._changed(key, lambda old: (old or b"") + _raw(value))

    def compare_set(self, key: str, expected_value: str | bytes, desired_value: str | bytes) -> bytes:
        """Writes the desired value if the key has the expected one, or is not there and "" is expected. Returns what is there then, or
        the expected value if nothing is."""
        expected, desired = _raw(expected_value), _raw(desired_value)
        after = self._changed(key, lambda old: desired if (old or b"") == expected else None)
        return expected if after is None else after

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all are there now."""
        return all(self._read(key) is not None for key in keys)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Waits until all are there. Raises DistStoreError after the timeout, by default the store's."""
        missing, decided, failures = {self._prefix + key for key in keys}, threading.Event(), list[ElasticError]()

        def seen(found: KeyValue) -> None:
            if found.value is not None:
                missing.discard(found.key)
            if not missing:
                decided.set()

        def failed(error: ElasticError) -> None:
            failures.append(error)
            decided.set()

        seconds = (timeout or cast(Any, self).timeout).total_seconds()
        watch = KeyWatch(self._access.client, self._prefix + keys[0] if len(keys) == 1 else self._prefix, seen, failed)
        watch.start()
        in_time = decided.wait(seconds)
        watch.stop()
        if failures:
            raise RendezvousConnectionError(f"the store of the rendezvous has lost its etcd: {failures[0]}") from failures[0]
        if not in_time:
            names = ", ".join(sorted(key.removeprefix(self._prefix) for key in missing))
            raise DistStoreError(f"wait timeout after {seconds:g} s, keys: {names}")

    def delete_key(self, key: str) -> bool:
        """Returns whether the key was there."""
        there = self._read(key) is not None
        self._access.repeated(lambda: self._access.client.delete(self._prefix + key))
        return there

    def num_keys(self) -> int:
        return len(self._access.repeated(lambda: self._access.client.get_prefix(self._prefix)))

    deleteKey, getNumKeys = delete_key, num_keys  # noqa: N815 the names by which torch's trampoline calls them

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def multi_set(self, keys: Sequence[str], values: Sequence[str | bytes]) -> None:
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def has_extended_api(self) -> bool:
        return True

    def _read(self, key: str) -> KeyValue | None:
        return self._access.repeated(lambda: self._access.client.get(self._prefix + key))

    def _changed(self, key: str, change: Callable[[bytes | None], bytes | None]) -> Any:
        """Replaces a value by one that depends on it, again while others replace it too; None leaves it. Returns what is there then."""
        while True:
            found = self._read(key)
            old = None if found is None else _bytes(found)
            new = change(old)
            if new is None:
                return old
            try:
                self._write(key, new, 0 if found is None else found.mod_revision)
                return new
            except Conflict:
                continue

    def _write(self, key: str, value: bytes, revision: int) -> None:
        lease, client = self._access.repeated(self._access.lease), self._access.client
        self._access.once(lambda: client.compare_and_put(self._prefix + key, _text(value), revision, lease=lease))


def _raw(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)


def _text(value: str | bytes) -> str:
    return b64encode(_raw(value)).decode()


def _bytes(found: KeyValue) -> bytes:
    return b64decode(found.value or "")
