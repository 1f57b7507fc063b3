"""Tests the harness's etcd: its faults are real, its history is read back, and it outlives the thread that started it again."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from elastic.chaos.own_etcd import OwnEtcd, _coded
from tests.conftest import wait_for_end

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnEtcd]:
    made = OwnEtcd(tmp_path_factory.mktemp("own") / "etcd")
    yield made
    made.kill()


def test_its_history_has_every_write_and_deletion(etcd: OwnEtcd):
    for value in ("one", "two"):
        etcd.call("kv/put", key=_coded("/elastic/view"), value=_coded(value))
    etcd.call("kv/deleterange", key=_coded("/elastic/view"))
    assert etcd.history("/elastic/") == [("/elastic/view", "one"), ("/elastic/view", "two"), ("/elastic/view", None)]
    assert etcd.keys("/elastic/") == []


def test_without_space_it_refuses_writes_and_serves_reads(etcd: OwnEtcd):
    etcd.alarm(full=True)
    assert (etcd.writes(), etcd.serves()) == (False, True)
    etcd.alarm(full=False)
    assert etcd.writes()


def test_it_outlives_the_thread_that_started_it_again(etcd: OwnEtcd):
    etcd.call("kv/put", key=_coded("/elastic/kept"), value=_coded("x"))
    before = etcd.pid
    etcd.kill()
    assert (etcd.serves(), etcd.pid) == (False, None)
    thread = threading.Thread(target=etcd.start)
    thread.start()
    thread.join()
    assert etcd.pid not in (None, before)
    assert not wait_for_end(etcd.pid or 0, 0.5), "it ended with the thread"
    assert etcd.serves()
    assert etcd.keys("/elastic/") == ["/elastic/kept"]
