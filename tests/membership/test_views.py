from __future__ import annotations

import dataclasses
import queue
from collections.abc import Mapping

import pytest

from elastic.errors import Conflict, EtcdUnavailable
from elastic.membership.founding import found
from elastic.membership.views import Missing, ViewStore, mark, number
from elastic.view import View
from tests.etcd_access import Compare, EtcdClient, KeyValue
from tests.membership.test_founding import ready


@pytest.fixture(scope="module")
def view() -> View:
    return found({0: ready(profile=True), 1: ready()}, None)


def store_of(client: EtcdClient, prefix: str = "/elastic/job/first/") -> ViewStore:
    return ViewStore(client, prefix)


def committed(client: EtcdClient, store: ViewStore) -> str | None:
    entry = client.get(store.key)
    return None if entry is None else entry.value


def test_the_first_view_is_published_once_and_its_mark_is_small(client: EtcdClient, view: View) -> None:
    store = store_of(client)
    assert committed(client, store) is None
    store.publish(view)
    assert committed(client, store) == mark(view)
    assert number(mark(view)) == (1, 0)
    assert len(mark(view)) < 150
    assert mark(view) != mark(dataclasses.replace(view, workload=dataclasses.replace(view.workload, state_bytes=1.0)))
    with pytest.raises(Conflict):
        store_of(client).publish(view)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "garbage",
        "{}",
        "[1]",
        "7",
        "null",
        '{"epoch": 1, "attempt": "0", "digest": ""}',
        '{"epoch": true, "attempt": 0, "digest": ""}',
    ],
)
def test_what_is_no_mark_has_no_number(text: str | None) -> None:
    assert number(text) is None


def test_jobs_do_not_see_each_others_views(client: EtcdClient, view: View) -> None:
    store_of(client).publish(view)
    assert committed(client, store_of(client, "/elastic/job/second/")) is None


def test_watchers_get_every_view_that_their_agent_has_proposed(client: EtcdClient, view: View) -> None:
    store = store_of(client)
    seen: queue.Queue[View] = queue.Queue()
    strange: queue.Queue[str] = queue.Queue()
    store.watch(seen.put, strange.put)
    store.publish(view)
    assert seen.get(timeout=5) is view
    second, third = (dataclasses.replace(view, epoch=epoch) for epoch in (2, 3))
    client.put(store.key, "not a view at all")
    client.transaction([], {store.key: store.propose(second)})
    client.put(store.key, mark(third))
    client.put(store.key, store.propose(second))
    assert [seen.get(timeout=5).epoch for _ in range(2)] == [2, 2]
    assert ["not a view at all" in strange.get(timeout=5), '"epoch": 3' in strange.get(timeout=5)] == [True, True]


def test_only_a_few_views_are_kept_for_a_watch(client: EtcdClient, view: View) -> None:
    store = store_of(client)
    for epoch in range(100):
        store.propose(dataclasses.replace(view, epoch=epoch))
    assert len(store._views) < 10


def test_what_etcd_has_lost_of_the_committed_view_is_known(client: EtcdClient, view: View) -> None:
    store, newer = store_of(client), dataclasses.replace(view, epoch=2)
    assert store.missing() is None, "before the first nothing is lost"
    store.publish(view)
    assert store.missing() is None
    for there in (None, "garbage", mark(dataclasses.replace(view, epoch=0))):
        client.delete(store.key) if there is None else client.put(store.key, there)
        entry = client.get(store.key)
        assert store.missing() == Missing(found=Compare(key=store.key, mod_revision=entry.mod_revision if entry else 0), text=mark(view))
    client.put(store.key, mark(newer))
    with pytest.raises(Conflict, match="etcd has the view of epoch 2, which this one has not proposed"):
        store.missing()
    store.propose(newer)
    assert store.missing() is None, "a commit whose answer was lost"


class LosingAnswers:
    """An etcd that breaks off during a write: before it, or after it."""

    def __init__(self, *, written: bool) -> None:
        self.written = written
        self.entry: KeyValue | None = None

    def get(self, key: str) -> KeyValue | None:
        return self.entry

    def transaction(self, demands: object, puts: Mapping[str, str], *, lease: int | None = None, deletes: object = ()) -> int:
        if self.written:
            ((key, value),) = puts.items()
            self.entry = KeyValue(key=key, value=value, mod_revision=7)
        raise EtcdUnavailable("broke off")

    def watch_prefix(self, prefix: str, callback: object, failed: object) -> None:
        raise NotImplementedError


def test_an_unknown_result_is_resolved_by_reading(view: View) -> None:
    ViewStore(LosingAnswers(written=True), "/").publish(view)
    with pytest.raises(EtcdUnavailable, match="broke off"):
        ViewStore(LosingAnswers(written=False), "/").publish(view)
