"""Tests an etcd of several members, by TLS, with a password in a file, and of versions with known holes."""

from __future__ import annotations

import queue
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elastic.errors import EtcdRefused, EtcdUnavailable, SettingsError
from elastic.membership import versions
from tests.etcd_access import Channels, EtcdClient, EtcdEndpoint, change_password, enable_auth, etcd_with
from tests.etcd_cluster import Certificates, Cluster, cluster

pytestmark = [pytest.mark.usefixtures("leftovers")]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    made = Certificates.made(tmp_path_factory.mktemp("certificates"))
    made.sign("server", "IP:127.0.0.1", "DNS:localhost")
    made.sign("elsewhere", "DNS:elsewhere")
    made.sign("client")
    return made


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates.made(tmp_path_factory.mktemp("stranger"))


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path / "etcd", 3) as running:
        yield running


def wait_until_served(client: EtcdClient, seconds: float = 10.0) -> float:
    """Returns the seconds until the client is served again."""
    began = time.monotonic()
    while True:
        try:
            client.put("/again", "x")
            return time.monotonic() - began
        except EtcdUnavailable:
            assert time.monotonic() - began < seconds
            time.sleep(0.05)


def numbers(seen: queue.Queue[str], last: str) -> list[str]:
    found = []
    while not found or found[-1] != last:
        found.append(seen.get(timeout=15))
    return found


@pytest.mark.long
def test_a_client_goes_on_with_another_member_and_its_watch_too(three: Cluster) -> None:
    """The member that it uses is killed, then stopped, which breaks no connection."""
    client, seen = EtcdClient(EtcdEndpoint.parse(three.addresses)), queue.Queue[str]()
    client.watch_prefix("/w/", lambda entry: seen.put(str(entry.value)))
    client.put("/w/1", "1")
    lease = client.grant(60)
    assert numbers(seen, "1") == ["1"]
    for number, harm in ((2, three.kill), (3, lambda member: three.signal(signal.SIGSTOP, member))):
        used = three.ports.index(client_port(client))
        harm(used)
        assert wait_until_served(client) < 8.0
        assert client.refresh(lease)
        client.put(f"/w/{number}", str(number))
        assert numbers(seen, str(number)) == [str(number)], "each change once"
        three.start(used) if number == 2 else three.signal(signal.SIGCONT, used)
        three.wait(EtcdEndpoint(addresses=(f"127.0.0.1:{three.ports[used]}",)))
    client.close()


def client_port(client: EtcdClient) -> int:
    """The port of the member that a client uses."""
    channels: Any = client._channels
    return client.endpoint.places[channels._index][1]


@pytest.mark.slow
def test_a_transaction_is_made_elsewhere_only_if_it_surely_was_not_done(three: Cluster) -> None:
    three.kill(0)
    client = EtcdClient(EtcdEndpoint.parse(three.addresses))
    client.put_if_absent("/once", "x")
    used = three.ports.index(client_port(client))
    three.signal(signal.SIGSTOP, used)
    with pytest.raises(EtcdUnavailable, match="no answer in time") as unknown:
        client.put_if_absent("/twice", "x")
    assert not unknown.value.surely_not_done
    three.signal(signal.SIGCONT, used)
    client.close()


def test_one_that_is_slow_everywhere_is_waited_for() -> None:
    channels = Channels(EtcdEndpoint(addresses=("127.0.0.1:1", "127.0.0.1:2")))
    assert channels.patience(5.0) == 1.5
    for _ in range(2):
        channels.leave(channels.current, late=True)
    assert channels.patience(5.0) == 5.0
    channels.answered(3.0)
    assert channels.patience(5.0) == 5.0, "it is slow, and answers"
    channels.answered(0.1)
    assert channels.patience(5.0) == 1.5
    assert channels.patience(0.3) == 0.3
    channels.close()


@pytest.mark.slow
def test_tls_checks_both_sides(certificates: Certificates, stranger: Certificates, tmp_path: Path) -> None:
    ca, cert, key = (certificates.path(name) for name in ("ca.pem", "client.pem", "client.key"))
    mutual = {"ca": ca, "cert": cert, "key": key}
    with cluster(
        tmp_path / "etcd", certificates=certificates, client_cert_auth="true", trusted_ca_file=certificates.path("ca.pem")
    ) as etcd:
        etcd.wait(EtcdEndpoint.parse(etcd.addresses, mutual))
        for address in (etcd.addresses, etcd.addresses.replace("127.0.0.1", "localhost")):
            client = EtcdClient(EtcdEndpoint.parse(address, mutual))
            client.put("/x", "y")
            client.close()
        with pytest.raises(EtcdRefused, match=r"it wants a certificate of this client, by etcd_cert="):
            EtcdClient(EtcdEndpoint.parse(etcd.addresses, {"ca": ca}))
        with pytest.raises(EtcdRefused, match=r"CERTIFICATE_VERIFY_FAILED.*not signed by etcd_ca="):
            EtcdClient(EtcdEndpoint.parse(etcd.addresses, {**mutual, "ca": stranger.path("ca.pem")}))
        with pytest.raises(EtcdUnavailable, match=r"does not require TLS \(etcd_ca=\)"):
            EtcdClient(EtcdEndpoint.parse(etcd.addresses))


@pytest.mark.slow
def test_a_certificate_for_another_name_is_refused(certificates: Certificates, tmp_path: Path) -> None:
    elsewhere = {"cert_file": certificates.path("elsewhere.pem"), "key_file": certificates.path("elsewhere.key")}
    with cluster(tmp_path / "etcd", certificates=certificates, **elsewhere) as etcd:
        began = time.monotonic()
        while time.monotonic() - began < 20:
            with pytest.raises(EtcdUnavailable) as refused:
                EtcdClient(EtcdEndpoint.parse(etcd.addresses, {"ca": certificates.path("ca.pem")}))
            if isinstance(refused.value, EtcdRefused):
                break
            time.sleep(0.1)
        assert "its certificate does not name this address" in str(refused.value)


@pytest.mark.slow
def test_certificates_that_are_replaced_are_read_again(certificates: Certificates, stranger: Certificates, tmp_path: Path) -> None:
    trusted = tmp_path / "trusted.pem"
    shutil.copy(certificates.path("ca.pem"), trusted)
    with cluster(tmp_path / "etcd", certificates=certificates) as etcd:
        endpoint = EtcdEndpoint.parse(etcd.addresses, {"ca": str(trusted)})
        etcd.wait(endpoint)
        client = EtcdClient(endpoint)
        etcd.kill()
        shutil.copy(stranger.path("ca.pem"), trusted)
        etcd.start()
        for _ in range(100):
            with pytest.raises(EtcdUnavailable) as unserved:
                client.get("/x")
            if "TLS" in str(unserved.value):
                break
            time.sleep(0.1)
        assert not isinstance(unserved.value, EtcdRefused), "it was served before, so this may pass"
        shutil.copy(certificates.path("ca.pem"), trusted)
        wait_until_served(client)
        client.close()


def test_files_that_do_not_fit_are_named_before_anything_starts(certificates: Certificates, tmp_path: Path) -> None:
    ca, cert, key = (certificates.path(name) for name in ("ca.pem", "client.pem", "client.key"))
    password, broad = tmp_path / "password", tmp_path / "broad"
    for path in (password, broad):
        path.write_text("right\n")
    password.chmod(0o600)
    broad.chmod(0o644)
    for text, files, why in (
        ("h:1", {"ca": str(tmp_path / "none")}, "etcd_ca=.*none.* cannot be read"),
        ("h:1", {"ca": key}, "etcd_ca=.* has no certificate"),
        ("h:1", {"cert": cert, "key": key}, "need each other, and etcd_ca="),
        ("h:1", {"ca": ca, "cert": cert}, "need each other"),
        ("h:1", {"ca": ca, "cert": cert, "key": certificates.path("server.key")}, "are not a certificate and its own key"),
        ("h:1", {"password_file": str(password)}, "needs the user's name"),
        ("me:right@h:1", {"password_file": str(password)}, "given twice"),
        ("me@h:1", {"password_file": str(broad)}, "can be read by other users"),
        ("me@h:1", {}, "needs etcd_password_file="),
    ):
        with pytest.raises(SettingsError, match=why):
            EtcdEndpoint.parse(text, files)
    assert EtcdEndpoint.parse("me@h:1", {"password_file": str(password)}).current_password() == "right"


@pytest.mark.slow
def test_a_password_in_a_file_may_change(tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.touch(0o600)
    with etcd_with(tmp_path / "etcd") as etcd:
        enable_auth(etcd.endpoint())
        password.write_text("wrong")
        login = EtcdEndpoint.parse(f"root@{etcd.endpoint()}", {"password_file": str(password)})
        with pytest.raises(EtcdRefused, match=rf"check user and password in {password}"):
            EtcdClient(login)
        password.write_text("right")
        client = EtcdClient(login)
        client.put("/x", "1")
        change_password(login, "other")
        with pytest.raises(EtcdUnavailable, match=rf"write the new one into {password}") as changed:
            client.get("/x")
        assert not isinstance(changed.value, EtcdRefused)
        password.write_text("other")
        assert client.get("/x") is not None
        client.close()


@pytest.mark.parametrize(
    ("address", "version", "warned"),
    [
        ("127.0.0.1:1", "3.5.1", True),
        ("127.0.0.1:1", "3.5.31", True),
        ("127.0.0.1:1", "3.5.32", False),
        ("127.0.0.1:1", "3.6.12", True),
        ("127.0.0.1:1", "3.6.13", False),
        ("127.0.0.1:1", "3.4.43", True),
        ("127.0.0.1:1", "3.7.0-rc.1", False),
        ("127.0.0.1:1", "4.0.0", False),
        ("127.0.0.1:1", None, False),
        ("127.0.0.1:1", "not provided", False),
        ("unix:/run/etcd", "3.5.1", False),
    ],
)
def test_versions_with_holes_are_warned_of(address: str, version: str | None, warned: bool) -> None:
    sentence = versions.warning(EtcdEndpoint.parse(address), version)
    assert (sentence is not None) == warned
    assert sentence is None or "upgrade it to 3.5.32 or 3.6.13" in sentence


@pytest.mark.parametrize(
    ("address", "cert", "warned"),
    [
        ("127.0.0.1:1", None, True),
        ("a:1,b:2", None, True),
        ("a:1", "c.pem", False),
        ("me:word@a:1", None, False),
        ("unix:/run/etcd", None, False),
    ],
)
def test_an_etcd_without_a_login_is_warned_of(address: str, cert: str | None, warned: bool) -> None:
    """Whoever writes there can stop the job: it takes a forged view for that of another coordinator."""
    sentence = versions.unprotected(replace(EtcdEndpoint.parse(address), cert=cert))
    assert (sentence is not None) == warned
    assert sentence is None or "anybody who reaches its port can stop this job" in sentence
