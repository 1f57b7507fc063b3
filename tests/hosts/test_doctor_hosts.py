"""Tests `elastic doctor` against a job of other hosts: the same checks as before this host joins it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.hosts.agents import Cluster
from tests.hosts.test_hosts import STEPS, hosts  # noqa: F401  (a fixture)
from tests.hosts.test_requests import asked

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("leftovers")]


def examined(made: Cluster, **how: Any) -> tuple[int, dict[str, dict[str, str]]]:
    done = asked(made, "doctor", "--json", "--job", "job", **how)
    assert done.stderr == ""
    return done.returncode, {each["what"]: each for each in json.loads(done.stdout)["findings"]}


@pytest.mark.parametrize("tls", [False, True])
def test_a_host_is_examined_for_a_job(hosts: Cluster, tls: bool) -> None:  # noqa: F811
    code, found = examined(hosts)
    assert code == 0
    assert found["job"]["found"] == "no job of several hosts with the name 'job' runs at this etcd"
    first = hosts.host(STEPS * 20, {}, 0.05, workers=1, **({"tls": True} if tls else {}))
    first.has_members()
    code, found = examined(hosts)
    assert code == 0, found
    assert found["job"]["found"] == "job has 1 host, and the same secret"
    assert [("MB/s there" in each["found"], each["level"]) for what, each in found.items() if what.startswith("link ")] == [(True, "ok")]
    assert found["fits the job"]["found"] == "the job would take this host"
    code, found = examined(hosts, secret=hosts.secret("not the secret of this job"))
    assert (code, found["job"]["level"], found["job"]["found"]) == (1, "error", "the job 'job' has another secret")
    assert "fits the job" not in found
    first.process.terminate()
    assert first.process.wait(60) == 143
