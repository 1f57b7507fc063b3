"""The behaviour that torch demands of a backend: that of its own tests for backends."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousStateError

from elastic.torchrun.backend import Access, EtcdV3Backend
from tests.etcd_access import EtcdClient, EtcdEndpoint
from tests.etcd_cluster import cluster

KEY = "/torchrun/run/state"


@pytest.fixture
def backend(client: EtcdClient) -> EtcdV3Backend:
    return EtcdV3Backend(Access(client, patience_s=5, ttl_s=60), KEY)


def test_there_is_no_state_at_first(backend: EtcdV3Backend) -> None:
    assert backend.get_state() is None


def test_a_state_is_set_without_a_token_if_there_is_none(backend: EtcdV3Backend) -> None:
    written = backend.set_state(b"\x00one\xff")
    assert written is not None
    state, token, success = written
    assert (state, success) == (b"\x00one\xff", True)
    assert backend.get_state() == (state, token)


def test_an_existing_state_stays_without_a_token(backend: EtcdV3Backend) -> None:
    written = backend.set_state(b"one")
    assert written is not None
    assert backend.set_state(b"two") == (b"one", written[1], False)


def test_the_right_token_replaces_it_once(backend: EtcdV3Backend) -> None:
    first = backend.set_state(b"one")
    assert first is not None
    second = backend.set_state(b"two", first[1])
    assert second is not None
    assert second[::2] == (b"two", True)
    assert second[1] != first[1]
    assert backend.set_state(b"three", first[1]) == (b"two", second[1], False)


@pytest.mark.parametrize("token", ["text", 12345678, ("tuple",)])
def test_a_wrong_token_replaces_nothing(backend: EtcdV3Backend, token: object) -> None:
    assert backend.set_state(b"one", token) is None
    written = backend.set_state(b"one")
    assert written is not None
    assert backend.set_state(b"two", token) == (b"one", written[1], False)


def test_a_write_whose_answer_was_lost_counts(backend: EtcdV3Backend) -> None:
    """etcd did it, and it was then asked again."""
    first = backend.set_state(b"one")
    assert first is not None
    second = backend.set_state(b"two", first[1])
    assert backend.set_state(b"two", first[1]) == second


@pytest.mark.parametrize("text", ["no base64!", "AAAA"])
def test_a_state_of_something_else_is_an_error(backend: EtcdV3Backend, client: EtcdClient, text: str) -> None:
    client.put(KEY, text)
    with pytest.raises(RendezvousStateError, match="is not what a backend"):
        backend.get_state()


def test_the_state_expires_when_all_nodes_have_gone(backend: EtcdV3Backend, client: EtcdClient) -> None:
    backend.set_state(b"one")
    found = client.get(KEY)
    assert found is not None
    client.revoke(found.lease)
    assert backend.get_state() is None


@pytest.mark.long
def test_an_outage_is_waited_for_and_then_an_error(tmp_path: Path) -> None:
    with cluster(tmp_path) as etcd:
        client = EtcdClient(EtcdEndpoint.parse(etcd.addresses), timeout_s=0.5)
        backend = EtcdV3Backend(Access(client, patience_s=30, ttl_s=60), KEY)
        first = backend.set_state(b"one")
        assert first is not None
        etcd.kill()
        back = threading.Thread(target=etcd.start)
        back.start()
        second = backend.set_state(b"two", first[1])
        back.join()
        assert second is not None
        assert second[::2] == (b"two", True)
        etcd.kill()
        with pytest.raises(RendezvousConnectionError, match="has lost its etcd"):
            EtcdV3Backend(Access(client, patience_s=0.5, ttl_s=60), KEY).get_state()
        client.close()
