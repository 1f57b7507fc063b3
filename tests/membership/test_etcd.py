from __future__ import annotations

import dataclasses
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from elastic.errors import Conflict, EtcdFull, EtcdRefused, EtcdUnavailable, SettingsError
from tests.etcd_access import EtcdClient, EtcdEndpoint, KeyValue, change_password, enable_auth, etcd_with, etcd_with_login, etcdrpc


def test_an_endpoint_has_a_host_a_port_and_maybe_a_login() -> None:
    assert EtcdEndpoint.parse("etcd.local:2379") == EtcdEndpoint(addresses=("etcd.local:2379",))
    assert EtcdEndpoint.parse("me:p@ss:word@10.0.0.1:2") == EtcdEndpoint(addresses=("10.0.0.1:2",), user="me", password="p@ss:word")
    assert EtcdEndpoint.parse("[::1]:2379").places == [("::1", 2379)]
    several = EtcdEndpoint.parse("me@corp:a,b@etcd-0:1,[fe80::1]:2,10.0.0.1:3")
    assert (several.user, several.password) == ("me@corp", "a,b")
    assert several.places == [("etcd-0", 1), ("fe80::1", 2), ("10.0.0.1", 3)]


def test_an_endpoint_may_be_a_socket_on_this_host() -> None:
    for text in ("unix:/run/etcd", "unix:/run/a:b@c:1"):
        assert EtcdEndpoint.parse(text) == EtcdEndpoint(addresses=(text,))
        assert str(EtcdEndpoint.parse(text)) == text
        assert EtcdEndpoint.parse(f"me:p@ss@{text}") == EtcdEndpoint(addresses=(text,), user="me", password="p@ss")
        assert EtcdEndpoint.parse(text).path == text.removeprefix("unix:")


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "host",
            "host:",
            ":2379",
            "host:port",
            "user@host:1",
            "user:@host:1",
            ":secret@host:1",
            "https://host:1",
            "host:1,",
            "::1:2379",
        ),
        *("host:1,unix:/path", "a:1, b:2"),
    ],
)
def test_another_endpoint_is_refused_without_showing_a_password(text: str) -> None:
    with pytest.raises(SettingsError, match="host:port") as refused:
        EtcdEndpoint.parse(text)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("text", ["host:0", "host:65536", "host:2379,[::1]:99999", "user:secret@host:99999"])
def test_a_port_that_is_none_is_refused_without_showing_a_password(text: str) -> None:
    with pytest.raises(SettingsError, match="has no port from 1 to 65535") as refused:
        EtcdEndpoint.parse(text)
    assert "secret" not in str(refused.value)


def test_the_printed_endpoint_hides_the_login() -> None:
    assert str(EtcdEndpoint.parse("user:secret@host:1")) == "host:1"


def test_what_is_put_can_be_read_one_by_one_and_by_prefix(client: EtcdClient) -> None:
    client.put("/a/1", "one")
    client.put("/a/2", "two")
    client.put("/b", "other")
    entry = client.get("/a/1")
    assert entry is not None
    assert entry.value == "one"
    assert {found.key: found.value for found in client.get_prefix("/a/")} == {"/a/1": "one", "/a/2": "two"}
    assert client.get("/a/3") is None


def test_delete_prefix_leaves_the_neighbours(client: EtcdClient) -> None:
    client.put("/a/1", "one")
    client.put("/ab", "neighbour")
    client.delete_prefix("/a/")
    assert client.get_prefix("/a/") == []
    assert client.get("/ab") is not None


def test_only_the_first_put_if_absent_writes(client: EtcdClient) -> None:
    client.put_if_absent("/once", "first")
    with pytest.raises(Conflict, match="/once"):
        client.put_if_absent("/once", "second")
    entry = client.get("/once")
    assert entry is not None
    assert entry.value == "first"


def test_compare_and_put_follows_the_revision(client: EtcdClient) -> None:
    first = client.put_if_absent("/swap", "a")
    second = client.compare_and_put("/swap", "b", first)
    with pytest.raises(Conflict):
        client.compare_and_put("/swap", "stale", first)
    assert client.get("/swap") == KeyValue(key="/swap", value="b", mod_revision=second)


def test_a_lease_lives_until_it_is_revoked(client: EtcdClient) -> None:
    lease = client.grant(30)
    client.put("/leased", "x", lease=lease)
    assert client.refresh(lease)
    client.revoke(lease)
    assert client.get("/leased") is None
    assert not client.refresh(lease)


def test_a_watch_sees_what_is_there_and_every_change_in_order(client: EtcdClient) -> None:
    seen: queue.Queue[KeyValue] = queue.Queue()
    client.put("/w/1", "before")
    client.watch_prefix("/w/", seen.put)
    assert seen.get(timeout=5).value == "before"
    client.put("/w/2", "two")
    client.put("/other", "unseen")
    client.put("/w/2", "three")
    client.delete_prefix("/w/1")
    events = [seen.get(timeout=5) for _ in range(3)]
    assert [(event.key, event.value) for event in events] == [("/w/2", "two"), ("/w/2", "three"), ("/w/1", None)]


class _Forwarder:
    """A TCP relay to etcd that can be cut, and then refuses what comes."""

    def __init__(self, target: EtcdEndpoint) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self._target = target.path or ""
        self._connections: list[socket.socket] = []
        self.broken = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self.broken = True
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                if self.broken:
                    near.close()
                    continue
                far = socket.socket(socket.AF_UNIX)
                far.connect(self._target)
                self._connections += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for connection in self._connections:
            connection.close()


@pytest.fixture
def forwarder(endpoint: EtcdEndpoint) -> Iterator[_Forwarder]:
    relay = _Forwarder(endpoint)
    yield relay
    relay.close()


@pytest.mark.slow
def test_a_watch_goes_on_after_an_outage_where_it_was(client: EtcdClient, forwarder: _Forwarder) -> None:
    far = EtcdClient(EtcdEndpoint(addresses=(f"127.0.0.1:{forwarder.port}",)))
    seen: queue.Queue[KeyValue] = queue.Queue()
    far.watch_prefix("/w/", seen.put)
    client.put("/w/1", "before")
    assert seen.get(timeout=5).value == "before"
    forwarder.cut()
    with pytest.raises(EtcdUnavailable, match="cannot be reached"):
        far.put("/w/2", "lost")
    client.put("/w/3", "during")
    client.put("/w/3", "again")
    forwarder.broken = False
    assert [seen.get(timeout=10).value for _ in range(2)] == ["during", "again"]
    assert seen.empty()
    far.close()


def test_a_closed_port_is_unavailable_and_says_what_to_check() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(EtcdUnavailable, match=rf"127.0.0.1:{port} cannot be reached .*check that it runs"):
        EtcdClient(EtcdEndpoint(addresses=(f"127.0.0.1:{port}",)))


@pytest.mark.slow
def test_a_silent_endpoint_is_given_up_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(EtcdUnavailable, match="no answer in time"):
            EtcdClient(EtcdEndpoint(addresses=(f"127.0.0.1:{silent.getsockname()[1]}",)), timeout_s=0.5)
        assert time.monotonic() - began < 3


def test_a_closed_client_says_so(endpoint: EtcdEndpoint) -> None:
    client = EtcdClient(endpoint)
    client.close()
    with pytest.raises(EtcdUnavailable, match="closed"):
        client.get("/x")


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[str]:
    with etcd_with_login(tmp_path) as endpoint:
        yield endpoint


@pytest.mark.slow
def test_a_login_is_used_for_everything_and_a_wrong_one_is_refused(guarded: str) -> None:
    for text in (guarded, f"root:wrong@{guarded}", f"nobody:right@{guarded}"):
        with pytest.raises(EtcdUnavailable, match="check user and password") as refused:
            EtcdClient(EtcdEndpoint.parse(text))
        assert refused.value.surely_not_done
        assert "wrong" not in str(refused.value)
    client = EtcdClient(EtcdEndpoint.parse(f"root:right@{guarded}"))
    seen: queue.Queue[KeyValue] = queue.Queue()
    client.watch_prefix("/w/", seen.put)
    lease = client.grant(30)
    client.put_if_absent("/w/1", "x", lease=lease)
    assert client.refresh(lease)
    assert seen.get(timeout=5).value == "x"
    client.close()


def test_a_login_where_none_is_wanted_is_refused(endpoint: EtcdEndpoint) -> None:
    with pytest.raises(EtcdUnavailable, match="authentication is not enabled"):
        EtcdClient(dataclasses.replace(endpoint, user="a", password="b"))


def test_what_is_too_large_is_refused_and_not_called_an_outage(tmp_path: Path, client: EtcdClient) -> None:
    with pytest.raises(EtcdRefused, match="the value of /large has 65537 bytes"):
        client.put("/large", "x" * 65537)
    with etcd_with(tmp_path, max_request_bytes="1000") as etcd:
        small = EtcdClient(etcd.endpoint())
        small.put("/small", "x" * 500)
        for call in (lambda: small.put("/large", "x" * 2000), lambda: small.put_if_absent("/large", "x" * 2000)):
            with pytest.raises(EtcdRefused, match=r"refused a request as too large .*max-request-bytes") as refused:
                call()
            assert refused.value.surely_not_done
        small.close()


def test_an_etcd_without_space_is_no_outage_either(tmp_path: Path) -> None:
    with etcd_with(tmp_path, quota_backend_bytes="200000") as etcd:
        client = EtcdClient(dataclasses.replace(etcd.endpoint(), private=False))
        lease = client.grant(30)

        def fill() -> None:  # etcd checks its size when it commits a batch, every 100 ms
            for number in range(2000):
                client.put(f"/{number}", "x" * 60000)

        with pytest.raises(EtcdFull, match=r"has no space left .*: compact and defragment it, .*etcdctl alarm disarm"):
            fill()
        assert client.refresh(lease), "leases go on"
        client.close()


@pytest.mark.slow
def test_a_login_that_ran_out_is_renewed_and_one_that_is_wrong_by_now_is_an_outage(tmp_path: Path) -> None:
    with etcd_with(tmp_path) as etcd:
        enable_auth(etcd.endpoint())
        endpoint = dataclasses.replace(etcd.endpoint(), user="root", password="right")
        client = EtcdClient(endpoint)
        seen: queue.Queue[str | None] = queue.Queue()
        failed: queue.Queue[Exception] = queue.Queue()
        client.watch_prefix("/w/", lambda entry: seen.put(entry.value), failed.put)
        lease = client.grant(30)

        def once_it_is_back(call: Callable[[], Any]) -> Any:
            for _ in range(200):
                try:
                    return call()
                except EtcdRefused:
                    raise
                except EtcdUnavailable:
                    time.sleep(0.02)
            return call()

        etcd.kill()
        etcd.start()  # it has lost all tokens
        assert once_it_is_back(lambda: client.refresh(lease))
        client.put("/w/1", "x")
        assert seen.get(timeout=10) == "x"
        change_password(endpoint, "other")
        with pytest.raises(EtcdUnavailable, match="its password has changed since this job began; set the old one again") as changed:
            client.get("/w/1")
        assert not isinstance(changed.value, EtcdRefused)
        assert failed.empty()
        client.close()


@pytest.mark.slow
def test_a_watch_sees_that_etcd_came_back_without_its_data(tmp_path: Path) -> None:
    with etcd_with(tmp_path) as etcd:
        client = EtcdClient(etcd.endpoint())
        seen: queue.Queue[tuple[str, str | None]] = queue.Queue()
        for number in range(5):
            client.put("/w/1", str(number))
        client.watch_prefix("/w/", lambda entry: seen.put((entry.key, entry.value)))
        assert seen.get(timeout=5) == ("/w/1", "4")
        etcd.kill()
        etcd.start(empty=True)
        etcd.endpoint()
        assert seen.get(timeout=10) == ("/w/1", None)
        client.put("/w/2", "x")
        assert seen.get(timeout=10) == ("/w/2", "x"), "though its revisions are lower than those seen before"
        client.close()


def test_what_is_no_text_is_told_as_it_can_be(client: EtcdClient) -> None:
    client._channels.current.kv.Put(etcdrpc.PutRequest(key=b"/bytes", value=b"\xff\xfe"))
    entry = client.get("/bytes")
    assert entry is not None
    assert entry.value == "\N{REPLACEMENT CHARACTER}" * 2


def test_a_bug_in_what_a_watch_calls_is_told(client: EtcdClient) -> None:
    failed: queue.Queue[Exception] = queue.Queue()
    client.put("/w/1", "x")
    client.watch_prefix("/w/", lambda entry: {}[entry.key], failed.put)
    assert "KeyError: '/w/1'" in str(failed.get(timeout=5))
