"""Tests each example under other launchers, with two workers killed: torchrun, and `elastic agent` on two hosts (network namespaces)."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from elastic.observe.activity import ActivityReader
from tests.conftest import Leftovers
from tests.hosts.agents import ROOT, Cluster, Host, cluster
from tests.hosts.namespaces import etcd_at, network
from tests.hosts.test_copies import parent
from tests.plain.test_example import EXAMPLES

RANKED = ROOT / "tests" / "process" / "ranked.py"
_WAIT_S = 120.0

pytestmark = [pytest.mark.long, pytest.mark.slow, pytest.mark.timeout(600)]
named = pytest.mark.parametrize(("name", "needs"), [pytest.param(name, needs, id=name) for name, _, needs in EXAMPLES])


@pytest.fixture
def digests(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, cached: dict[str, str]) -> Any:
    """Returns the digest of an example that one worker trains."""

    def digest(name: str, needs: tuple[str, ...]) -> str:
        if missing := [package for package in needs if importlib.util.find_spec(package) is None]:
            pytest.skip(f"needs {missing[0]}")
        folder = tmp_path_factory.mktemp(name)
        monkeypatch.chdir(folder)
        if name not in cached:
            cached[name] = alone(name, folder)
        return cached[name]

    return digest


@pytest.fixture(scope="module")
def cached() -> dict[str, str]:
    return {}


def alone(name: str, folder: Path) -> str:
    command = [sys.executable, "-m", "elastic.cli.main", "run", f"{ROOT}/examples/{name}.py:main", "--workers", "1"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


@named
def test_torchrun(name: str, needs: tuple[str, ...], digests: Any, tmp_path: Path, leftovers: Leftovers) -> None:
    digest = digests(name, needs)
    options = ["--standalone", "--monitor-interval=0.2", f"--log-dir={tmp_path / 'logs'}", "--nproc-per-node=2"]
    faults = ["1@20:forward", "0@45:backward"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(RANKED), str(tmp_path / "run"), "", *faults]
    more = {"EXAMPLE": name, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}  # importing peft or transformers makes one
    done = subprocess.run(command, env=environment(**more), capture_output=True, text=True, timeout=300, check=False)
    found = [json.loads(line.removeprefix("ranked ")) for line in done.stdout.splitlines() if line.startswith("ranked ")]
    assert sorted(each["rank"] for each in found) == ["0", "1"], done.stdout + done.stderr
    assert [(each["digest"], each["kinds"].count("death"), each["missed"], each["again"]) for each in found] == [(digest, 2, 0, "0")] * 2


@named
def test_agents_on_two_hosts(name: str, needs: tuple[str, ...], digests: Any, tmp_path: Path, leftovers: Leftovers) -> None:
    digest = digests(name, needs)
    with network(2) as net, etcd_at(net.gateway, tmp_path / "etcd") as etcd, cluster(tmp_path / "cluster", etcd) as made:
        first, second = both = started(made, f"{ROOT}/examples/{name}.py:main", [net.command(0), net.command(1)])
        killed = [kill(first, 20), kill(second, 45)]
        assert [host.result(300) for host in both] == [digest, digest]
        deaths = [each for each in first.incidents if each["kind"] == "death"]
        assert [each["worker"] for each in deaths] == killed, first.said


def started(made: Cluster, target: str, within: list[list[str]]) -> tuple[Host, Host]:
    first = made.host(target=target, hosts_min=2, within=within[0])
    first.until("waiting for 1 more host")
    return first, made.host(target=target, within=within[1])


def kill(host: Host, step: int) -> int:
    """Kills a worker of a host in this step, or soon behind it; returns its number."""
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline and host.process.poll() is None:
        with suppress(OSError):  # there are no members yet, or one is just dying
            told = json.loads((host.directory / "members.json").read_text())
            own = [each for each in told["members"] if each["pid"] and parent(each["pid"]) == told["forkserver"]]
            doing = ActivityReader(host.directory, own[-1]["worker"]).read() if own else None
            if doing is not None and doing.step >= step:
                os.kill(own[-1]["pid"], signal.SIGKILL)
                return own[-1]["worker"]
        time.sleep(0.01)
    raise AssertionError(f"no step {step} was reached: {host.said}")
