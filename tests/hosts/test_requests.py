"""Tests `elastic status`, `scale`, `drain`, `kill` and `stop` with a running job of two hosts, and who may use them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer

from elastic.cli import asking
from tests.hosts.agents import ROOT, Cluster
from tests.hosts.test_hosts import hosts  # noqa: F401  (a fixture)

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("leftovers")]


def asked(made: Cluster, *words: str, secret: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "elastic.cli.main", *words, "--etcd", made.etcd, "--secret-file", str(secret or made.secret())]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)


def status(made: Cluster) -> dict[str, Any]:
    return json.loads(asked(made, "status", "job", "--json").stdout)


def until(made: Cluster, workers: int) -> dict[str, Any]:
    """Waits until the job has so many members."""
    deadline = time.monotonic() + 60.0
    while True:
        told = status(made)
        if sum(len(host["workers"]) for host in told["hosts"]) == workers:
            return told
        assert time.monotonic() < deadline, told


def test_a_job_is_asked_scaled_drained_and_stopped_from_outside(hosts: Cluster) -> None:  # noqa: F811
    first = hosts.host(100_000, {}, 0.05, hosts_min=2)
    first.until("waiting for 1 more host")
    second = hosts.host(100_000, {}, 0.05)
    second.has_members()
    told = until(hosts, 4)
    assert (told["phase"], told["layout"], told["coordinator"]) == ("running", "[0-4]x4", told["hosts"][0]["name"])
    assert asked(hosts, "scale", "job", "3").stdout == "the job is scaled to 3 workers at the next step boundary\n"
    until(hosts, 3)
    refused = asked(hosts, "scale", "job", "5")
    assert (refused.returncode, refused.stderr) == (1, "error: 5 workers: the hosts have room for 4, and the job needs 1\n")
    asked(hosts, "scale", "job", "4")
    ended = until(hosts, 4)["hosts"][1]["workers"][0]
    assert asked(hosts, "kill", "job", "99").stderr.startswith("error: there is no worker 99; there are ")
    assert asked(hosts, "kill", "job", str(ended)).stdout.startswith(f"worker {ended} is ended, and the others go on")
    first.until(f"worker {ended} (place 2) was evicted")
    assert "its end was asked for" in first.said
    name = until(hosts, 4)["hosts"][1]["name"]
    assert "has another secret" in asked(hosts, "stop", "job", secret=hosts.secret("not the secret of this job")).stderr
    assert "no job of several hosts with the name 'nojob'" in asked(hosts, "stop", "nojob").stderr
    assert f"no host 'nobody' takes part; there are {told['coordinator']}, {name}" in asked(hosts, "drain", "job", "nobody").stderr
    asked(hosts, "drain", "job", name)
    assert second.process.wait(60) == 130, second.said
    assert "cannot be drained: 0 workers would be left" in asked(hosts, "drain", "job", told["coordinator"]).stderr
    asked(hosts, "stop", "job")
    assert first.process.wait(60) == 130, first.said
    kinds = [each["kind"] for each in first.incidents if each["kind"] != "rebalance"]
    assert kinds == ["drain", "join", "eviction", "join", "drain"]
    assert all(each["steps_redone"] == 0 for each in first.incidents if each["kind"] != "eviction")


def test_without_an_etcd_it_says_how_to_look_at_a_job_of_one_host(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended:
        asking.stop("mine")
    assert ended.value.exit_code == 2
    assert "look at it with `elastic top mine`, and stop it with Ctrl-C" in capsys.readouterr().err
