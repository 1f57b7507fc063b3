"""Tests jobs of several hosts at an etcd of three members, by TLS, with a password."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.etcd_access import EtcdClient, EtcdEndpoint, enable_auth
from tests.etcd_cluster import Certificates
from tests.etcd_cluster import cluster as etcd_cluster
from tests.hosts.agents import Cluster
from tests.hosts.test_hosts import STEPS, calm, hosts

__all__ = ["hosts"]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("leftovers")]

PASSWORD = "a-password-like-no-other-text"


def seen_of_processes() -> Iterator[bytes]:
    """Command line and environment of every process that this user may look at."""
    for entry in Path("/proc").iterdir():
        for name in ("cmdline", "environ") if entry.name.isdigit() else ():
            try:
                yield (entry / name).read_bytes()
            except OSError:  # it is another user's, or has ended
                continue


@pytest.mark.long
def test_hosts_meet_at_an_etcd_with_tls_and_a_password_that_nobody_else_sees(hosts: Cluster, tmp_path: Path) -> None:
    certificates = Certificates.made(tmp_path / "certificates")
    certificates.sign("server", "IP:127.0.0.1")
    certificates.sign("client")
    files = {name: certificates.path(path) for name, path in (("ca", "ca.pem"), ("cert", "client.pem"), ("key", "client.key"))}
    password = tmp_path / "password"
    password.touch(0o600)
    password.write_text(PASSWORD)
    trusted = {"client_cert_auth": "true", "trusted_ca_file": certificates.path("ca.pem")}
    with etcd_cluster(tmp_path / "etcd", 3, certificates=certificates, **trusted) as etcd:
        etcd.wait(EtcdEndpoint.parse(etcd.addresses, files))
        enable_auth(EtcdEndpoint.parse(etcd.addresses, files), PASSWORD)
        etcd.kill(0)  # the one that is asked first
        options = {f"etcd_{name}": path for name, path in files.items()} | {"etcd_password_file": password}
        first = hosts.host(STEPS * 4, {}, 0.05, hosts_min=2, etcd=f"root@{etcd.addresses}", **options)
        first.until("waiting for 1 more host")
        second = hosts.host(STEPS * 4, {}, 0.05, etcd=f"root@{etcd.addresses}", **options)
        second.until("has version")
        client = EtcdClient(EtcdEndpoint.parse(f"root@{etcd.addresses}", {**files, "password_file": str(password)}))
        while not (keys := client.get_prefix("/elastic/job/")) or "view" not in {entry.key.rpartition("/")[2] for entry in keys}:
            assert first.process.poll() is None, first.said
        values = [str(entry).encode() for entry in keys]
        assert not [text for text in (*seen_of_processes(), *values) if PASSWORD.encode() in text]
        assert first.result() == second.result() == calm(STEPS * 4)
        (outcome,) = client.get_prefix("/elastic/")  # for hosts that were cut off; it expires
        assert outcome.key.startswith("/elastic/job/ended/")
        assert outcome.lease
        client.close()
    for host in (first, second):
        assert host.said.count("has version 3.") == 1, "it is warned of once"
        assert PASSWORD not in host.said
