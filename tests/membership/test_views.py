from __future__ import annotations

import dataclasses
import queue

import pytest

from elastic.errors import Conflict, EtcdUnavailable
from elastic.membership.founding import found
from elastic.membership.views import ViewStore
from elastic.view import View
from tests.etcd_access import Entry, EtcdClient
from tests.membership.test_founding import ready


@pytest.fixture(scope="module")
def view() -> View:
    return found({0: ready(profile=True), 1: ready()}, None)


def test_the_first_view_is_published_once(client: EtcdClient, view: View) -> None:
    store = ViewStore(client, "job")
    assert store.read() is None
    revision = store.publish(view)
    assert store.read() == (view, revision)
    with pytest.raises(Conflict):
        store.publish(view)


def test_a_later_view_replaces_only_the_one_it_was_made_from(client: EtcdClient, view: View) -> None:
    store = ViewStore(client, "job")
    first = store.publish(view)
    second = store.publish(dataclasses.replace(view, epoch=2), first)
    with pytest.raises(Conflict):
        store.publish(dataclasses.replace(view, epoch=3), first)
    assert store.read() == (dataclasses.replace(view, epoch=2), second)


def test_jobs_do_not_see_each_others_views(client: EtcdClient, view: View) -> None:
    ViewStore(client, "job").publish(view)
    assert ViewStore(client, "job-2").read() is None


def test_watchers_get_every_committed_view(client: EtcdClient, view: View) -> None:
    store = ViewStore(client, "job")
    seen: queue.Queue[tuple[View, int]] = queue.Queue()
    store.watch(lambda committed, revision: seen.put((committed, revision)))
    first = store.publish(view)
    second = store.publish(dataclasses.replace(view, epoch=2), first)
    assert seen.get(timeout=5) == (view, first)
    assert seen.get(timeout=5) == (dataclasses.replace(view, epoch=2), second)


class LosingAnswers:
    """An etcd that breaks off during a write: before it, or after it."""

    def __init__(self, *, written: bool) -> None:
        self.written = written
        self.entry: Entry | None = None

    def get(self, key: str) -> Entry | None:
        return self.entry

    def compare_and_put(self, key: str, value: str, expected_mod_revision: int) -> int:
        if self.written:
            self.entry = Entry(key=key, value=value, mod_revision=expected_mod_revision + 7)
        raise EtcdUnavailable("broke off")

    def watch_prefix(self, prefix: str, callback: object) -> None:
        raise NotImplementedError


def test_an_unknown_result_is_resolved_by_reading(view: View) -> None:
    assert ViewStore(LosingAnswers(written=True), "job").publish(view) == 7
    with pytest.raises(EtcdUnavailable, match="broke off"):
        ViewStore(LosingAnswers(written=False), "job").publish(view)
