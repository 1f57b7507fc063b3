"""What can be seen of a job of two hosts from outside, also after the coordinator is lost."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tests.hosts.agents import ROOT, Cluster
from tests.hosts.test_hosts import hosts  # noqa: F401  (a fixture)
from tests.hosts.test_requests import asked

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("leftovers")]

TARGET = f"{ROOT / 'tests/process/seen_job.py'}:train"


def events(made: Cluster) -> list[dict[str, Any]]:
    return [json.loads(line) for line in asked(made, "events", "job", "--json").stdout.splitlines()]


def top(made: Cluster) -> dict[str, Any]:
    done = asked(made, "top", "job", "--json")
    return json.loads(done.stdout) if done.returncode == 0 else {"coordinator": None, "step": None, "said": done.stderr}


def until(made: Cluster, holds: Any) -> dict[str, Any]:
    deadline = time.monotonic() + 90.0
    while not holds(told := top(made)):
        assert time.monotonic() < deadline, told
    return told


def test_hosts_are_seen_from_outside_also_when_the_coordinator_is_lost(hosts: Cluster) -> None:  # noqa: F811
    first = hosts.host(100_000, None, 0.05, hosts_min=2, target=TARGET)
    first.until("waiting for 1 more host")
    second = hosts.host(100_000, None, 0.05, target=TARGET)
    second.has_members()
    told = until(hosts, lambda told: told["step"] is not None and all(each["memory"] for each in told["workers"]))
    assert [len(host["workers"]) if "workers" in host else host["room"] for host in told["hosts"]] == [2, 2]
    assert {each["host"] for each in told["workers"]} == {host["name"] for host in told["hosts"]}
    assert [event["kind"] for event in events(hosts)][:1] == ["begun"]
    output = asked(hosts, "logs", "job").stdout.splitlines()
    assert output[0] == "[0-3] every worker begins (4 times)", "workers of both hosts"
    assert asked(hosts, "logs", "job", "3").stdout == "[3]   every worker begins\n", "a worker of the other host"

    json.loads((first.directory / "live.json").read_text())
    first.process.kill()
    after = until(hosts, lambda now: now["coordinator"] not in (None, told["coordinator"]) and (now["step"] or 0) > told["step"])
    assert [host["name"] for host in after["hosts"]] == [after["coordinator"]]
    said = [event for event in events(hosts) if event["kind"] in ("said", "incident")]
    assert any("coordinates the job now" in event.get("text", "") for event in said), said
    assert any(event["kind"] == "incident" and event["incident"]["kind"] == "death" for event in said), said
    asked(hosts, "stop", "job")
    assert second.process.wait(60) == 130, second.said
    steps = [json.loads(line)["step"] for line in (second.directory / "steps.jsonl").read_text().splitlines()]
    assert steps == [*range(steps[0], steps[-1] + 1)], "the new coordinator records each step once"
