"""Tests encrypted links: what others in the network can read and change, whose certificates are accepted, who can stand in between."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from comm_cluster import PATIENCE_S, Cluster, Peer, clusters, pattern, tag, until

from elastic.comm import Network
from elastic.comm.handshake import Handshake
from elastic.comm.job_certificate import job_credentials
from elastic.comm.link import Link
from elastic.comm.tls import Credentials, Tls
from elastic.errors import LinkError, SettingsError
from tests.etcd_cluster import Certificates
from tests.wire_tap import WireTap

pytestmark = pytest.mark.timeout(60)

SECRET = b"secret"


@pytest.fixture
def cluster() -> Iterator[Callable[..., Cluster]]:
    yield from clusters("tls")


@pytest.fixture
def pair() -> Iterator[Callable[..., tuple[Network, Network]]]:
    """Makes workers 0 and 1 of two hosts, with these credentials, or links in the clear."""
    made: list[Network] = []

    def make(*credentials: Credentials | None) -> tuple[Network, Network]:
        for worker, each in enumerate(credentials):
            tls = None if each is None else Tls(each)
            made.append(Network(worker, secret=SECRET, host=f"host-{worker}", interface="127.0.0.1", tls=tls))
        return made[-2], made[-1]

    yield make
    for each in made:
        each.close()


def tcp(network: Network) -> tuple[str, int]:
    ip, port = dict(part.split(":", 1) for part in network.address.split(","))["tcp"].rsplit(":", 1)
    return ip, int(port)


def join(zero: Network, one: Network, through: WireTap | None = None, timeout_s: float = PATIENCE_S) -> None:
    """Worker 1 dials worker 0, maybe through somebody."""
    address = "tcp:{}:{}".format(*(tcp(zero) if through is None else through.address))
    members = [Peer(0, "host-0", address), Peer(1, "host-1", one.address)]
    other = threading.Thread(target=lambda: _quietly(lambda: zero.install(1, 0, members, [1], timeout_s=timeout_s)))
    other.start()
    try:
        one.install(1, 0, members, [0], timeout_s=timeout_s)
    finally:
        if not one.stats.links:
            zero.interrupt(LinkError("over"))
        other.join()


def _quietly(action: Callable[[], None]) -> None:
    try:
        action()
    except LinkError:
        return


def certificate(folder: Certificates, name: str, authority: str = "ca.pem") -> Credentials:
    read = {field: Path(folder.path(file)).read_text() for field, file in (("certificate", f"{name}.pem"), ("key", f"{name}.key"))}
    return Credentials(**read, authority=Path(folder.path(authority)).read_text())


# --- the network


@pytest.mark.parametrize("encrypted", [True, False])
def test_somebody_in_the_network_reads_nothing(pair: Callable[..., tuple[Network, Network]], encrypted: bool) -> None:
    """Without TLS it can be read, so the tap works."""
    zero, one = pair(*[job_credentials(SECRET) if encrypted else None] * 2)
    tap = WireTap(tcp(zero))
    try:
        join(zero, one, tap)
        data = pattern(300_000)
        zero.send(1, tag(), b"a small message", data)
        assert one.receive(0, tag()).tobytes() == b"a small message" + data.tobytes()
        assert (b"a small message" in tap.seen) == (data[1000:1100].tobytes() in tap.seen) == (not encrypted)
    finally:
        tap.close()


def test_what_somebody_changes_breaks_the_link_and_is_not_received(pair: Callable[..., tuple[Network, Network]]) -> None:
    zero, one = pair(*[job_credentials(SECRET)] * 2)
    tap = WireTap(tcp(zero))
    try:
        join(zero, one, tap)
        tap.change = lambda data: data[:-1] + bytes([data[-1] ^ 1])
        zero.send(1, tag(), b"right")
        with pytest.raises(LinkError, match=r"worker 0.*(BAD_RECORD_MAC|bad record mac)"):
            one.receive(0, tag())
        assert not one.arrived(0, tag())
    finally:
        tap.close()


# --- messages and records


def test_messages_that_came_together_are_all_received_though_the_kernel_announces_them_once(cluster: Callable[..., Cluster]) -> None:
    c = cluster(2)
    link = c[1]._links[0]
    assert isinstance(link, Link)
    with link._reader:
        for i in range(1000):
            c[0].send(1, tag(i), bytes([i % 256]) * 40)
        c[0].flush()
    until(lambda: c[1].arrived(0, tag(999)))
    assert [c[1].receive(0, tag(i))[0] for i in range(1000)] == [i % 256 for i in range(1000)]


def test_one_that_waits_for_the_first_of_several_leaves_the_others_to_the_io_thread(cluster: Callable[..., Cluster]) -> None:
    c = cluster(2)
    for round in range(50):
        waiting = c.blocked(1, lambda round=round: c[1].receive(0, tag(round, 0)))
        for a in range(8):
            c[0].send(1, tag(round, a), pattern(3000))
        waiting.result(PATIENCE_S)
        until(lambda round=round: all(c[1].arrived(0, tag(round, a)) for a in range(1, 8)))


@pytest.mark.slow
@pytest.mark.long
def test_a_receiver_that_does_not_read_costs_its_sender_little_memory(cluster: Callable[..., Cluster]) -> None:
    c = cluster(2)
    link = c[1]._links[0]
    data = pattern(30_000_000)
    with link._reader:
        c[0].send(1, tag(), data)
        sender = c[0]._links[1].sender
        assert sender.pending
        assert len(sender._stream._encrypted) + sender._stream._outgoing.pending < 1 << 18
    assert np.array_equal(c[1].receive(0, tag()), data)


# --- certificates


def test_the_job_s_certificate_depends_on_the_secret_alone() -> None:
    assert job_credentials(b"one") == job_credentials(b"one")
    assert job_credentials(b"one").certificate != job_credentials(b"two").certificate
    assert job_credentials(b"one").key not in repr(job_credentials(b"one"))


def test_tls_is_1_3_and_both_sides_show_a_certificate(cluster: Callable[..., Cluster]) -> None:
    c = cluster(2)
    for worker in (0, 1):
        stream = c[worker]._links[1 - worker]._stream
        assert stream._tls.version() == "TLSv1.3"
        assert stream.certificate() == ssl.PEM_cert_to_DER_cert(job_credentials(SECRET).certificate)


def test_hosts_of_one_job_agree_on_tls(pair: Callable[..., tuple[Network, Network]]) -> None:
    with pytest.raises(LinkError, match="the other side uses TLS, and this side does not: give every host of the job the same --tls"):
        join(*pair(job_credentials(SECRET), None))
    with pytest.raises(LinkError, match="the other side does not use TLS, and this side does"):
        join(*pair(None, job_credentials(SECRET)))


def test_a_certificate_of_another_secret_is_not_accepted(pair: Callable[..., tuple[Network, Network]]) -> None:
    with pytest.raises(LinkError, match=r"certificate is not accepted .*all hosts of a job need certificates from its secret"):
        join(*pair(job_credentials(SECRET), job_credentials(b"another")))


def test_given_certificates_are_accepted_if_the_authority_has_signed_them(
    pair: Callable[..., tuple[Network, Network]], tmp_path: Path
) -> None:
    ours, theirs = Certificates.made(tmp_path / "ours"), Certificates.made(tmp_path / "theirs")
    for each, name in ((ours, "a"), (ours, "b"), (theirs, "c")):
        each.sign(name)
    zero, one = pair(certificate(ours, "a"), certificate(ours, "b"))
    join(zero, one)
    zero.send(1, tag(), b"x")
    assert one.receive(0, tag()).tobytes() == b"x"
    with pytest.raises(LinkError, match="certificate"):
        join(*pair(certificate(ours, "a"), certificate(theirs, "c")))
    trusting = Credentials(**{**certificate(theirs, "c").to_json(), "authority": certificate(ours, "a").authority})
    with pytest.raises(LinkError, match="does not accept this one's certificate"):
        join(*pair(certificate(ours, "a"), trusting))


def test_wrong_files_are_told_apart(tmp_path: Path) -> None:
    ours = Certificates.made(tmp_path)
    ours.sign("a")
    ours.sign("b")
    good = certificate(ours, "a")
    with pytest.raises(SettingsError, match="tls_ca= has no certificate"):
        Tls(Credentials(**{**good.to_json(), "authority": "none"}))
    with pytest.raises(SettingsError, match="tls_cert= and tls_key= are not a certificate and its own key"):
        Tls(Credentials(**{**good.to_json(), "key": certificate(ours, "b").key}))


class Between:
    """Has a certificate of the hosts' own authority, and not the secret: ends TLS on both sides, and passes on what is inside."""

    def __init__(self, target: tuple[str, int], tls: Tls) -> None:
        self._target, self._tls = target, tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self.inside = bytearray()  # what it has read inside TLS
        self._thread = threading.Thread(target=self._stand, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._thread.join(PATIENCE_S)
        self._listener.close()

    def _stand(self) -> None:
        here, _ = self._listener.accept()
        with here, socket.create_connection(self._target, PATIENCE_S) as there:
            shake = Handshake(secret=b"", worker=0, peer=None)
            here.sendall(_exactly(there, len(shake.opening)))
            there.sendall(_exactly(here, shake.expected))
            here.sendall(_exactly(there, 32))
            streams = self._tls.stream(here, dials=False), self._tls.stream(there, dials=True)
            for stream in streams:
                stream.handshake()
            room = memoryview(bytearray(1 << 16))
            for source, target in ((1, 0), (0, 1), (1, 0), (0, 1), (1, 0)):
                count = streams[source].recv_into(room)
                self.inside += room[:count]
                if not count:
                    return
                streams[target].sendmsg([room[:count]])


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        data += sock.recv(count - len(data)) or pytest.fail("the stream has ended")
    return data


def test_nobody_stands_in_between_who_has_a_certificate_and_not_the_secret(
    pair: Callable[..., tuple[Network, Network]], tmp_path: Path
) -> None:
    ours = Certificates.made(tmp_path)
    for name in ("a", "b", "evil"):
        ours.sign(name)
    zero, one = pair(certificate(ours, "a"), certificate(ours, "b"))
    between = Between(tcp(zero), Tls(certificate(ours, "evil")))
    try:
        with pytest.raises(LinkError, match="another secret, or is not the expected worker"):
            join(zero, one, between)  # type: ignore[arg-type]
        assert zero.stats.links == one.stats.links == frozenset()
        until(lambda: zero.rejected == 1)
        assert len(between.inside) > 100, "it did read the challenge inside TLS"
    finally:
        between.close()
