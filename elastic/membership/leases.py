"""A lease: its keys show that the owner lives, and expire soon after it stops renewing them."""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from elastic.errors import Conflict, ElasticError, EtcdRefused, EtcdUnavailable, JobFailed, NameLost

if TYPE_CHECKING:
    from elastic.membership.etcd import Compare

_KEPT_EVERY_S = 5.0  # at least
_ANSWERS = 5  # a lease lives at least as long as so many of etcd's slowest recent answers take
_AT_ONCE = 100  # keys in one request; etcd takes 128 by default
AWAY_S = 10.0  # an outage of etcd that lasts so long is reported, though nothing needs etcd now


class LeaseStore(Protocol):
    """The part of an etcd client that a lease needs."""

    def grant(self, ttl_s: int) -> int: ...
    def refresh(self, lease: int) -> bool: ...
    def revoke(self, lease: int) -> None: ...
    def transaction(
        self, demands: Sequence[Compare], puts: Mapping[str, str], *, lease: int | None = None, deletes: Iterable[str] = ()
    ) -> int: ...


def _nothing(*_: object) -> None:
    pass


def patient(ttl_s: int, slowest_s: float) -> int:
    """Returns the time to live of a lease that is to live for `ttl_s`, at an etcd whose slowest recent answer has taken `slowest_s`."""
    return max(ttl_s, math.ceil(_ANSWERS * slowest_s))


class Lease:
    """Keys under one lease. `keep` renews the lease; if it expired in an outage, `keep` makes a new one with the same keys.

    `start` runs `keep` three times per time to live, and at least every `every_s`, in a thread, where no training code can delay it. What
    `keep` does may take many answers of a slow etcd: a second thread renews the lease meanwhile, and those of `others`, which this agent
    helps to keep. `slowest` returns the seconds of etcd's slowest recent answer; at a slow etcd the lease is replaced by a longer one.
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
        slowest: Callable[[], float] = lambda: 0.0,
        others: Callable[[], Iterable[int]] = lambda: (),
        renewed: Callable[[int], None] = _nothing,
        kept: Callable[[], None] = _nothing,
        lost: Callable[[ElasticError], None] = _nothing,
        away: Callable[[EtcdUnavailable, float], None] = _nothing,
        say: Callable[[str], None] = _nothing,
    ) -> None:
        self._store = store
        self._least_s = ttl_s
        self._ttl_s = patient(ttl_s, slowest())
        self._every_s = every_s
        self._slowest, self._others = slowest, others
        self._renewed, self._kept, self._lost, self._away, self._say = renewed, kept, lost, away, say
        self._lock = threading.Lock()  # of the entries
        self._asking = threading.RLock()  # held by the thread that writes them
        self._entries: dict[str, str] = {}
        self._unwritten: set[str] = set()
        self._unwanted: set[str] = set()
        self._untold = self._ended = False
        self._error: ElasticError | None = None  # why it was not kept
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        self.vanished = False  # whether etcd did not know it once, though its time was not over: etcd has lost its data
        self._id = store.grant(self._ttl_s)
        self._refreshed_at, self._confirmed_at = time.monotonic(), _clocks()
        self._replaced_at = -math.inf

    @property
    def id(self) -> int:
        """The id of the current lease; it may change after an outage."""
        return self._id

    def keeps(self, seconds: float) -> bool:
        """Whether the lease is alive and was not replaced in the last `seconds`, or so many of etcd's answers. Raises EtcdUnavailable."""
        lease = self._id
        if not self._store.refresh(lease):
            return False
        return lease == self._id and time.monotonic() - self._replaced_at > seconds + 2 * _ANSWERS * self._slowest()

    def put(self, key: str, value: str) -> None:
        """Writes a key that lives as long as the lease; if etcd is unavailable or the lease is being renewed, soon after."""
        self.put_all({key: value})

    def put_all(self, entries: Mapping[str, str]) -> None:
        """Does what `put` does for many keys, with few requests."""
        with self._lock:
            self._entries.update(entries)
            self._unwritten.update(entries)
            self._unwanted.difference_update(entries)
        self._write_now()

    def drop(self, *keys: str) -> None:
        """Deletes keys of the lease; if etcd is unavailable or the lease is being renewed, soon after."""
        with self._lock:
            for key in keys:
                if self._entries.pop(key, None) is not None:
                    self._unwritten.discard(key)
                    self._unwanted.add(key)
        self._write_now()

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
        bodies = {"elastic-lease": self._keep_on}
        if self._least_s < self._every_s * 3:  # others live long enough
            bodies["elastic-pulse"] = self._hold_on
        self._threads = [threading.Thread(target=self._run, args=(body,), name=name, daemon=True) for name, body in bodies.items()]
        for thread in self._threads:
            thread.start()

    def stop(self, *, revoke: bool = True) -> None:
        """Stops renewing and revokes the lease with its keys. If etcd cannot be reached, the lease expires."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        if revoke:
            with suppress(EtcdUnavailable):
                self._store.revoke(self._id)

    def _keep(self) -> None:
        with self._asking:
            alive, ttl_s = self._store.refresh(self._id), patient(self._least_s, self._slowest())
            self.vanished = self.vanished or (not alive and _since(self._confirmed_at) < self._ttl_s)
            self._refreshed_at, self._confirmed_at = time.monotonic(), _clocks()
            if not alive or ttl_s > self._ttl_s or (ttl_s == self._least_s < self._ttl_s):
                self._replace(ttl_s)
            if self._untold:
                self._renewed(self._id)
                self._untold = False
            self._write()
            self._kept()

    def _replace(self, ttl_s: int) -> None:
        """Makes a new lease for the same keys; one that is still alive expires soon after they have been written again."""
        self._id, self._ttl_s = self._store.grant(ttl_s), ttl_s
        self._refreshed_at = self._replaced_at = time.monotonic()
        with self._lock:
            self._unwritten.update(self._entries)
        self._untold = True

    def _write_now(self) -> None:
        if self._asking.acquire(blocking=False):  # else the thread that holds it writes, or the next renewal does
            try:
                with suppress(EtcdUnavailable):
                    self._write()
            finally:
                self._asking.release()

    def _write(self) -> None:
        with self._lock:
            unwanted, unwritten = set(self._unwanted), {key: self._entries[key] for key in self._unwritten}
        for keys in _batches(unwanted):
            self._store.transaction([], {}, deletes=keys)
            with self._lock:
                self._unwanted.difference_update(keys)
        for keys in _batches(unwritten):
            self._store.transaction([], {key: unwritten[key] for key in keys}, lease=self._id)
            with self._lock:
                for key in keys:
                    if self._entries.get(key) == unwritten[key]:
                        self._unwritten.discard(key)
                    elif key not in self._entries:
                        self._unwanted.add(key)  # it was dropped meanwhile

    def _run(self, body: Callable[[], None]) -> None:
        try:
            body()
        except (NameLost, EtcdRefused) as error:
            self._end(error)
        except Exception:  # the thread's boundary: otherwise the lease would expire without a message
            self._end(JobFailed(f"the agent's thread for its lease at etcd failed; this is a bug:\n{traceback.format_exc()}"))

    def _end(self, error: ElasticError) -> None:
        with self._lock:
            first, self._ended = not self._ended, True
        if first:
            self._lost(error)

    def _hold_on(self) -> None:
        """Renews the leases when the other thread has not done so for a while, since it waits for etcd."""
        while not self._stopped.wait(min(self._ttl_s / 4, self._every_s)):
            if time.monotonic() - self._refreshed_at > min(self._ttl_s / 2.5, 2 * self._every_s):
                for lease in (self._id, *self._others()):
                    with suppress(EtcdUnavailable):  # the other thread reports it
                        self._store.refresh(lease)

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
            if not isinstance(self._error, EtcdUnavailable):
                continue  # etcd answers, and another agent has written first
            since = asked if since is None else since
            seconds = time.monotonic() - since
            self._away(self._error, seconds)
            if not reported and seconds > AWAY_S and not self._stopped.is_set():
                reported = True
                self._say(
                    f"etcd has not answered for {AWAY_S:.0f} s: training continues, but the recovery from a lost worker would wait for etcd"
                )


def _clocks() -> tuple[float, ...]:
    """Readings of clocks that go on while this machine sleeps, or are set right afterwards."""
    return time.clock_gettime(time.CLOCK_BOOTTIME), time.time()


def _since(then: tuple[float, ...]) -> float:
    """Returns the seconds that have passed at most since these readings."""
    return max(now - before for now, before in zip(_clocks(), then, strict=True))


def _batches(keys: Iterable[str]) -> Iterator[list[str]]:
    left = iter(sorted(keys))
    while batch := list(islice(left, _AT_ONCE)):
        yield batch
