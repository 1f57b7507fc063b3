"""A lease: its keys show that the owner lives, and expire soon after it stops renewing them."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from elastic.errors import Conflict, ElasticError, EtcdRefused, EtcdUnavailable, JobFailed, NameLost

_KEPT_EVERY_S = 5.0  # at least
AWAY_S = 10.0  # an outage of etcd that lasts so long is reported, though nothing needs etcd now


class LeaseStore(Protocol):
    """The part of an etcd client that a lease needs."""

    def grant(self, ttl_s: int) -> int: ...
    def refresh(self, lease: int) -> bool: ...
    def revoke(self, lease: int) -> None: ...
    def put(self, key: str, value: str, *, lease: int | None = None) -> None: ...
    def delete(self, key: str) -> None: ...


def _nothing(*_: object) -> None:
    pass


class Lease:
    """Keys under one lease. `keep` renews the lease; if it expired in an outage, `keep` makes a new one with the same keys.

    `start` runs `keep` three times per time to live, and at least every `every_s`, in a thread, where no training code can delay it.
    `renewed` gets the id of a new lease before its keys are written; `kept` is called after each renewal. `lost` gets, once, the error that
    ends the thread: NameLost, a refusal of etcd, or a bug. `away` gets each error of an outage, with its seconds; `say` gets a sentence
    about a long outage, and about its end.
    """

    def __init__(
        self,
        store: LeaseStore,
        ttl_s: int = 2,
        *,
        every_s: float = _KEPT_EVERY_S,
        renewed: Callable[[int], None] = _nothing,
        kept: Callable[[], None] = _nothing,
        lost: Callable[[ElasticError], None] = _nothing,
        away: Callable[[EtcdUnavailable, float], None] = _nothing,
        say: Callable[[str], None] = _nothing,
    ) -> None:
        self._store = store
        self._ttl_s = ttl_s
        self._every_s = every_s
        self._renewed, self._kept, self._lost, self._away, self._say = renewed, kept, lost, away, say
        self._lock = threading.RLock()
        self._entries: dict[str, str] = {}
        self._unwritten: set[str] = set()
        self._unwanted: set[str] = set()
        self._untold = False
        self._error: ElasticError | None = None  # why it was not kept
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._id = store.grant(ttl_s)

    @property
    def id(self) -> int:
        """The id of the current lease; it may change after an outage."""
        return self._id

    def put(self, key: str, value: str) -> None:
        """Writes a key that lives as long as the lease; if etcd is unavailable, as soon as it is back."""
        with self._lock:
            self._entries[key] = value
            self._unwritten.add(key)
            with suppress(EtcdUnavailable):
                self._write()

    def drop(self, key: str) -> None:
        """Deletes one of the lease's keys; if etcd is unavailable, as soon as it is back."""
        with self._lock:
            if self._entries.pop(key, None) is not None:
                self._unwritten.discard(key)
                self._unwanted.add(key)
            with suppress(EtcdUnavailable):
                self._write()

    def keep(self) -> bool:
        """Renews once. Returns whether etcd confirmed it. Raises NameLost and EtcdRefused."""
        try:
            self._keep()
        except EtcdRefused:
            raise
        except (EtcdUnavailable, Conflict) as error:
            self._error = error
            return False
        return True

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="elastic-lease", daemon=True)
        self._thread.start()

    def stop(self, *, revoke: bool = True) -> None:
        """Stops renewing and revokes the lease with its keys. If etcd cannot be reached, the lease expires."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        if revoke:
            with suppress(EtcdUnavailable):
                self._store.revoke(self._id)

    def _keep(self) -> None:
        with self._lock:
            if not self._store.refresh(self._id):
                self._id = self._store.grant(self._ttl_s)
                self._unwritten.update(self._entries)
                self._untold = True
            if self._untold:
                self._renewed(self._id)
                self._untold = False
            self._write()
            self._kept()

    def _write(self) -> None:
        for key in sorted(self._unwanted):
            self._store.delete(key)
            self._unwanted.discard(key)
        for key in sorted(self._unwritten):
            self._store.put(key, self._entries[key], lease=self._id)
            self._unwritten.discard(key)

    def _run(self) -> None:
        try:
            self._keep_on()
        except (NameLost, EtcdRefused) as error:
            self._lost(error)
        except Exception:  # the thread's boundary: otherwise the lease would expire without a message
            self._lost(JobFailed(f"the agent's thread for its lease at etcd failed; this is a bug:\n{traceback.format_exc()}"))

    def _keep_on(self) -> None:
        since: float | None = None
        reported = False
        while not self._stopped.wait(min(self._ttl_s / 3, self._every_s)):
            asked = time.monotonic()
            if self.keep():
                if reported:
                    self._say("etcd is back")
                since, reported = None, False
                continue
            since = asked if since is None else since
            seconds = time.monotonic() - since
            if isinstance(self._error, EtcdUnavailable):
                self._away(self._error, seconds)
            if not reported and seconds > AWAY_S and not self._stopped.is_set():
                reported = True
                self._say(
                    f"etcd has not answered for {AWAY_S:.0f} s: training continues, but the recovery from a lost worker would wait for etcd"
                )
