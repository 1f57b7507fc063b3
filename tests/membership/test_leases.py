from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest

from elastic.errors import Conflict, ElasticError, EtcdRefused, EtcdUnavailable, JobFailed, NameLost
from elastic.membership import leases
from elastic.membership.leases import Lease, patient


class FakeStore:
    """An etcd whose leases expire when the test says so, and which can be unreachable."""

    def __init__(self) -> None:
        self.keys: dict[str, tuple[str, int | None]] = {}
        self.leases: set[int] = set()
        self.away = False
        self.error: Exception | None = None
        self.refreshed = threading.Event()
        self._granted = self.requests = 0

    def expire(self) -> None:
        self.leases.clear()
        self.keys.clear()

    def grant(self, ttl_s: int) -> int:
        self._check()
        self._granted += 1
        self.leases.add(self._granted)
        return self._granted

    def refresh(self, lease: int) -> bool:
        self._check()
        self.refreshed.set()
        return lease in self.leases

    def revoke(self, lease: int) -> None:
        self._check()
        self.leases.remove(lease)
        self.keys = {key: entry for key, entry in self.keys.items() if entry[1] != lease}

    def transaction(self, demands: Sequence[Any], puts: Mapping[str, str], *, lease: int | None = None, deletes: Iterable[str] = ()) -> int:
        self._check()
        assert not demands
        assert not puts or lease in self.leases
        self.requests += 1
        self.keys |= {key: (value, lease) for key, value in puts.items()}
        for key in deletes:
            self.keys.pop(key, None)
        return 0

    def _check(self) -> None:
        if self.away:
            raise EtcdUnavailable("away")
        if self.error is not None:
            raise self.error


def test_many_keys_take_few_requests() -> None:
    store = FakeStore()
    lease = Lease(store, 2)
    lease.put_all({f"workers/{number}": "there" for number in range(250)})
    assert (len(store.keys), store.requests) == (250, 3)
    lease.drop(*(f"workers/{number}" for number in range(8)), "workers/unknown")
    assert (len(store.keys), store.requests) == (242, 4)


def test_keys_go_with_the_lease() -> None:
    store = FakeStore()
    lease = Lease(store)
    lease.put("a", "1")
    assert store.keys == {"a": ("1", 1)}
    lease.stop()
    assert store.keys == {}


def test_keeping_a_live_lease_writes_nothing() -> None:
    store = FakeStore()
    lease = Lease(store)
    lease.put("a", "1")
    store.keys["a"] = ("changed by somebody else", 1)
    assert lease.keep()
    assert store.keys == {"a": ("changed by somebody else", 1)}


def test_an_expired_lease_is_replaced_with_its_keys_once_that_is_told() -> None:
    store = FakeStore()
    told: list[int] = []
    failing = [EtcdUnavailable("away"), Conflict("not yet")]

    def renewed(lease: int) -> None:
        told.append(lease)
        if failing:
            raise failing.pop()

    lease = Lease(store, renewed=renewed)
    lease.put("a", "1")
    store.expire()
    assert [lease.keep(), lease.keep()] == [False, False]
    assert store.keys == {}, "not before the name is ours again"
    assert lease.keep()
    assert lease.keep()
    assert told == [2, 2, 2]
    assert store.keys == {"a": ("1", 2)}


def test_a_lease_that_etcd_does_not_know_before_its_time_shows_that_etcd_has_lost_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = [0.0, 1000.0]
    monkeypatch.setattr(leases, "_clocks", lambda: tuple(clocks))
    store = FakeStore()
    lease = Lease(store, ttl_s=60)
    for later in ((61.0, 1061.0), (62.0, 5000.0), (200.0, 5001.0)):  # the machine has slept, as one of its clocks knows
        clocks[:] = later
        store.expire()
        assert lease.keep()
        assert not lease.vanished
    clocks[:] = 259.0, 5060.0
    store.expire()
    assert lease.keep()
    assert lease.vanished


def test_a_name_that_is_lost_ends_it_and_writes_nothing() -> None:
    store = FakeStore()
    lost: queue.SimpleQueue[ElasticError] = queue.SimpleQueue()

    def renewed(_: int) -> None:
        raise NameLost("another has it")

    lease = Lease(store, ttl_s=0, renewed=renewed, lost=lost.put)
    lease.put("a", "1")
    store.expire()
    lease.start()
    assert isinstance(lost.get(timeout=5), NameLost)
    lease.stop()
    assert store.keys == {}


@pytest.mark.parametrize(("error", "kind"), [(EtcdRefused("no"), EtcdRefused), (ZeroDivisionError("a bug"), JobFailed)])
def test_its_thread_does_not_end_in_silence(error: Exception, kind: type[ElasticError]) -> None:
    store = FakeStore()
    lost: queue.SimpleQueue[ElasticError] = queue.SimpleQueue()
    lease = Lease(store, ttl_s=0, lost=lost.put)
    store.error = error
    lease.start()
    told = lost.get(timeout=5)
    assert type(told) is kind
    assert str(error) in str(told)
    store.error = None
    lease.stop()


def test_an_etcd_that_is_away_for_long_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "AWAY_S", -1.0)
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    store = FakeStore()
    lease = Lease(store, ttl_s=0, say=said.put)
    store.error = EtcdUnavailable("away")
    lease.start()
    assert "etcd has not answered" in said.get(timeout=5)
    store.error = None
    assert said.get(timeout=5) == "etcd is back"
    lease.stop()


def test_what_is_put_in_an_outage_is_written_after_it() -> None:
    store = FakeStore()
    lease = Lease(store)
    store.away = True
    lease.put("a", "1")
    assert not lease.keep()
    assert store.keys == {}
    store.away = False
    assert lease.keep()
    assert store.keys == {"a": ("1", 1)}


def test_the_thread_keeps_it_and_stop_works_without_etcd() -> None:
    store = FakeStore()
    lease = Lease(store, ttl_s=0)
    lease.start()
    assert store.refreshed.wait(5)
    store.away = True
    lease.stop()
    assert store.leases == {1}


@pytest.mark.parametrize(("slowest", "ttl"), [(0.0, 2), (0.4, 2), (0.41, 3), (3.0, 15)])
def test_a_lease_lives_for_several_of_the_slowest_answers(slowest: float, ttl: int) -> None:
    assert patient(2, slowest) == ttl


class SlowStore(FakeStore):
    """Notes the time to live of each lease."""

    def __init__(self) -> None:
        super().__init__()
        self.ttls: list[int] = []
        self.slowest = 0.0

    def grant(self, ttl_s: int) -> int:
        self.ttls.append(ttl_s)
        return super().grant(ttl_s)


def test_a_lease_is_replaced_by_a_longer_one_while_etcd_is_slow_before_it_expires() -> None:
    store = SlowStore()
    told: list[int] = []
    lease = Lease(store, slowest=lambda: store.slowest, renewed=told.append)
    lease.put("a", "1")
    for slowest in (0.1, 2.0, 2.0, 0.5, 0.1):
        store.slowest = slowest
        assert lease.keep()
        assert store.keys == {"a": ("1", lease.id)}
    assert store.ttls == [2, 10, 2]
    assert told == [2, 3]
    assert not lease.keeps(3600.0), "keys of other agents may be missing, since theirs may have expired"
    store.expire()
    assert not lease.keeps(0.0)


def test_a_lease_is_renewed_while_its_owner_waits_for_etcd() -> None:
    store, waits, renewed = FakeStore(), threading.Event(), list[int]()
    refresh = store.refresh
    goes_on = threading.Event()

    def noted(lease: int) -> bool:
        renewed.append(lease)
        if len(renewed) >= 6:
            goes_on.set()
        return refresh(lease) or lease == 99

    def kept() -> None:
        waits.set()
        assert goes_on.wait(10)

    store.refresh = noted  # pyright: ignore[reportAttributeAccessIssue]
    lease = Lease(store, ttl_s=1, others=lambda: [99], kept=kept)
    lease.start()
    assert waits.wait(10)
    lease.put("a", "1")
    assert goes_on.wait(10), "by the second thread, since the first one waits"
    assert renewed[1:6] == [1, 99, 1, 99, 1]
    while "a" not in store.keys:
        assert lease.keep()
    lease.stop()
