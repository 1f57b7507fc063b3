"""Tests jobs of several hosts whose links are encrypted, with certificates of the job or given ones, and who is turned away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import elastic
from elastic.errors import SettingsError
from tests.etcd_cluster import Certificates
from tests.hosts import script
from tests.hosts.agents import Cluster
from tests.hosts.test_hosts import STEPS, calm, hosts
from tests.hosts.test_requests import asked

__all__ = ["hosts"]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("leftovers")]


@pytest.mark.long
def test_hosts_with_tls_train_as_one_and_answer_and_a_host_without_is_turned_away(hosts: Cluster) -> None:
    first = hosts.host(STEPS * 4, {"6": [2, "worker"]}, 0.05, hosts_min=2, tls=True)
    first.until("waiting for 1 more host")
    assert json.loads(asked(hosts, "status", "job", "--json").stdout)["phase"] == "founding"
    plain = hosts.host(STEPS * 4)
    assert "the other side uses TLS, and this side does not: give every host of the job the same --tls" in plain.failure()
    second = hosts.host(STEPS * 4, {"6": [2, "worker"]}, 0.05, tls=True)
    assert first.result() == second.result() == calm(STEPS * 4)
    assert [each["kind"] for each in first.incidents][:2] == ["death", "join"]


@pytest.mark.long
def test_given_certificates_are_used_by_agents_workers_and_requests(hosts: Cluster, tmp_path: Path) -> None:
    ours = Certificates.made(tmp_path / "ours")
    for name in ("one", "two", "user"):
        ours.sign(name)

    def files(name: str) -> dict[str, str]:
        (tmp_path / "ours" / f"{name}.key").chmod(0o600)
        return {"tls_cert": ours.path(f"{name}.pem"), "tls_key": ours.path(f"{name}.key"), "tls_ca": ours.path("ca.pem")}

    first = hosts.host(STEPS * 2, {}, 0.05, hosts_min=2, **files("one"))
    first.until("waiting for 1 more host")
    of_the_job = hosts.host(STEPS * 2, tls=True)
    assert "certificate" in of_the_job.failure()
    assert "give the job's --tls-cert, --tls-key and --tls-ca" in asked(hosts, "status", "job").stderr
    words = [word for name, path in files("user").items() for word in (f"--{name.replace('_', '-')}", path)]
    assert asked(hosts, "status", "job", *words).stdout.startswith("job: founding")
    found = json.loads(asked(hosts, "doctor", "--json", "--job", "job", *words).stdout)["findings"]
    assert [each["level"] for each in found if each["what"].startswith("link ")] == ["ok"], found
    found = json.loads(asked(hosts, "doctor", "--json", "--job", "job").stdout)["findings"]
    assert any("give the job's --tls-cert, --tls-key and --tls-ca" in each["found"] for each in found), found
    second = hosts.host(STEPS * 2, {}, 0.05, **files("two"))
    assert first.result() == second.result() == calm(STEPS * 2)


def test_wrong_use_of_tls_is_refused_at_once(tmp_path: Path) -> None:
    ours = Certificates.made(tmp_path)
    ours.sign("a")
    files = {"tls_cert": ours.path("a.pem"), "tls_key": ours.path("a.key"), "tls_ca": ours.path("ca.pem")}
    shared = {"workers": 1, "etcd": "127.0.0.1:1", "secret": "a secret of many letters"}
    with pytest.raises(SettingsError, match="is for a job of several hosts: give secret= too"):
        elastic.run(script.train, workers=1, tls=True)
    with pytest.raises(SettingsError, match="need each other"):
        elastic.run(script.train, **shared, tls_cert=files["tls_cert"])
    (tmp_path / "a.key").chmod(0o644)
    with pytest.raises(SettingsError, match="can be read by other users of this host: chmod 600 it"):
        elastic.run(script.train, **shared, **files)
    (tmp_path / "a.key").chmod(0o600)
    with pytest.raises(SettingsError, match="are not a certificate and its own key"):
        elastic.run(script.train, **shared, **{**files, "tls_cert": files["tls_ca"]})
    with pytest.raises(SettingsError, match=r"tls_ca='.*nothing.pem' cannot be read: No such file"):
        elastic.run(script.train, **shared, **{**files, "tls_ca": str(tmp_path / "nothing.pem")})
