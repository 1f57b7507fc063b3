"""The agent's lease: its keys say that it lives, and vanish soon after it stops saying so."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Protocol

from elastic.errors import EtcdUnavailable


class LeaseStore(Protocol):
    """What a lease needs of an etcd client."""

    def grant(self, ttl_s: int) -> int: ...
    def refresh(self, lease: int) -> bool: ...
    def revoke(self, lease: int) -> None: ...
    def put(self, key: str, value: str, *, lease: int | None = None) -> None: ...
    def put_if_absent(self, key: str, value: str, *, lease: int | None = None) -> int: ...
    def delete(self, key: str) -> None: ...


class Lease:
    """Keys under one lease. `keep` renews it, and after an outage in which it expired makes a new one with the same keys.

    `start` runs `keep` three times per time to live in a thread, where no training code can hold it up.
    """

    def __init__(self, store: LeaseStore, ttl_s: int = 2) -> None:
        self._store = store
        self._ttl_s = ttl_s
        self._lock = threading.Lock()
        self._entries: dict[str, str] = {}
        self._unwritten: set[str] = set()
        self._unwanted: set[str] = set()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._id = store.grant(ttl_s)

    @property
    def id(self) -> int:
        """Of the lease as it is now; after an outage it may be another."""
        with self._lock:
            return self._id

    def put(self, key: str, value: str) -> None:
        """Writes a key that lives as long as the lease; if etcd is away, as soon as it is back."""
        with self._lock:
            self._entries[key] = value
            self._unwritten.add(key)
            with suppress(EtcdUnavailable):
                self._write()

    def drop(self, key: str) -> None:
        """Deletes one of the lease's keys; if etcd is away, as soon as it is back."""
        with self._lock:
            if self._entries.pop(key, None) is not None:
                self._unwritten.discard(key)
                self._unwanted.add(key)
            with suppress(EtcdUnavailable):
                self._write()

    def claim(self, key: str, value: str) -> None:
        """As `put`, but raises Conflict if somebody else has the key, and EtcdUnavailable."""
        with self._lock:
            self._store.put_if_absent(key, value, lease=self._id)
            self._entries[key] = value

    def keep(self) -> bool:
        """Renews once; whether etcd confirmed it."""
        with self._lock:
            try:
                if not self._store.refresh(self._id):
                    self._id = self._store.grant(self._ttl_s)
                    self._unwritten.update(self._entries)
                self._write()
            except EtcdUnavailable:
                return False
        return True

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="elastic-lease", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stops renewing and gives the lease up, with its keys. An unreachable etcd does so by itself."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(EtcdUnavailable):
            self._store.revoke(self._id)

    def _write(self) -> None:
        for key in sorted(self._unwanted):
            self._store.delete(key)
            self._unwanted.discard(key)
        for key in sorted(self._unwritten):
            self._store.put(key, self._entries[key], lease=self._id)
            self._unwritten.discard(key)

    def _run(self) -> None:
        while not self._stopped.wait(self._ttl_s / 3):
            self.keep()
