from __future__ import annotations

import threading

import pytest

from elastic.errors import Conflict, EtcdUnavailable
from elastic.membership.leases import Lease


class FakeStore:
    """An etcd whose leases expire when told to, and which can be away."""

    def __init__(self) -> None:
        self.keys: dict[str, tuple[str, int | None]] = {}
        self.leases: set[int] = set()
        self.away = False
        self.refreshed = threading.Event()
        self._granted = 0

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

    def put(self, key: str, value: str, *, lease: int | None = None) -> None:
        self._check()
        assert lease in self.leases
        self.keys[key] = (value, lease)

    def put_if_absent(self, key: str, value: str, *, lease: int | None = None) -> int:
        if key in self.keys:
            raise Conflict(key)
        self.put(key, value, lease=lease)
        return 1

    def _check(self) -> None:
        if self.away:
            raise EtcdUnavailable("away")


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


def test_an_expired_lease_is_replaced_with_its_keys() -> None:
    store = FakeStore()
    lease = Lease(store)
    lease.claim("record", "r")
    lease.put("a", "1")
    store.expire()
    assert lease.keep()
    assert store.keys == {"record": ("r", 2), "a": ("1", 2)}


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


def test_a_claimed_key_is_not_taken_from_its_owner() -> None:
    store = FakeStore()
    Lease(store).claim("record", "theirs")
    mine = Lease(store)
    with pytest.raises(Conflict):
        mine.claim("record", "mine")
    store.expire()
    mine.keep()
    assert store.keys == {}


def test_the_thread_keeps_it_and_stop_works_without_etcd() -> None:
    store = FakeStore()
    lease = Lease(store, ttl_s=0)
    lease.start()
    assert store.refreshed.wait(5)
    store.away = True
    lease.stop()
    assert store.leases == {1}
