"""torch's store on etcd, as torch calls it: through a `PrefixStore`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta

import pytest
from torch.distributed import DistStoreError, PrefixStore, Store

from elastic.torchrun.backend import Access
from elastic.torchrun.store import EtcdV3Store
from tests.etcd_access import EtcdClient

BYTES = bytes(range(256))


@pytest.fixture(params=["itself", "with a prefix"])
def store(client: EtcdClient, request: pytest.FixtureRequest) -> Iterator[Store]:
    made = EtcdV3Store(Access(client, patience_s=5, ttl_s=60), "/torchrun/run/store/")
    yield made if request.param == "itself" else PrefixStore("round.1", made)
    del made  # until now: a `PrefixStore` does not keep a store in Python alive


def test_values_are_what_was_set(store: Store) -> None:
    store.set("a", BYTES)
    store.set("b", "text")
    store.set("b", "")
    assert (store.get("a"), store.get("b")) == (BYTES, b"")
    assert store.multi_get(["a", "b"]) == [BYTES, b""]
    assert store.check(["a", "b"])
    assert not store.check(["a", "c"])


def test_numbers_are_added_by_many_at_once(store: Store) -> None:
    def added() -> None:
        for _ in range(5):
            store.add("sum", 2)

    threads = [threading.Thread(target=added) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert store.get("sum") == b"40"
    assert store.add("sum", -41) == -1


def test_compare_and_set(store: Store) -> None:
    assert store.compare_set("a", "expected", "desired") == b"expected"
    assert not store.check(["a"])
    assert store.compare_set("a", "", "first") == b"first"
    assert store.compare_set("a", "other", "second") == b"first"
    assert store.compare_set("a", "first", "second") == b"second"
    assert store.get("a") == b"second"


def test_values_grow_and_go(store: Store) -> None:
    store.append("a", "x")
    store.append("a", "y")
    assert store.get("a") == b"xy"
    assert store.num_keys() == 1
    assert store.delete_key("a")
    assert not store.delete_key("a")
    assert not store.check(["a"])


@pytest.mark.parametrize("how", ["get", "wait"])
def test_a_key_is_waited_for(store: Store, how: str) -> None:
    got: list[object] = []
    call = {"get": lambda: store.get("late"), "wait": lambda: store.wait(["early", "late"], timedelta(seconds=30))}[how]
    store.set("early", "1")
    waits = threading.Thread(target=lambda: got.append(call()))
    waits.start()
    store.set("late", "there")
    waits.join()
    assert got == [b"there" if how == "get" else None]


def test_waiting_ends_after_the_timeout(store: Store) -> None:
    store.set("there", "1")
    with pytest.raises(DistStoreError, match=r"after 0\.2 s, keys: .*never"):
        store.wait(["there", "never"], timedelta(seconds=0.2))
    store.set_timeout(timedelta(seconds=0.2))
    if isinstance(store, EtcdV3Store):
        with pytest.raises(DistStoreError, match="never"):
            store.get("never")
