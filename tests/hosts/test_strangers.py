"""Tests that an outsider on the same network and another user of the same host can neither join, read, stop nor stall a job."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from elastic.comm.job_certificate import job_credentials
from elastic.launch.sharing import key_of
from tests.etcd_access import EtcdClient, EtcdEndpoint
from tests.hosts.agents import ROOT, SCRIPT, Cluster, Host
from tests.hosts.strangers import Stranger, listening, size
from tests.hosts.test_hosts import STEPS, calm, hosts

__all__ = ["hosts"]

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("leftovers"), pytest.mark.timeout(600)]

SECRET = "a secret of thirty-two letters..."
ROOM, ROOM_BYTES = 300, 100 << 20
_LONG_S = 240.0  # a job under attack shares the processors with its attacker
INTRUDER = Path(__file__).parent / "intruder.py"


def processes(*directories: Path) -> list[int]:
    """Agents, fork servers and workers of a job with these run directories."""
    found = [json.loads((directory / "members.json").read_text()) for directory in directories]
    workers = {member["pid"] for each in found for member in each["members"]}
    return sorted(workers | {each[name] for each in found for name in ("agent", "forkserver")})


def kinds(host: Host) -> set[str]:
    """Of the incidents; work is shifted when the machine is busy."""
    return {each["kind"] for each in host.incidents} - {"rebalance"} if (host.directory / "incidents.jsonl").exists() else set()


def forms(secret: str) -> list[str]:
    """The secret, and what is made of it and as good."""
    key = bytes.fromhex(key_of(secret))
    proof = hmac.new(key, b"links between agents", hashlib.sha256).digest()
    private = "".join(job_credentials(key).key.splitlines()[1:-1])
    return [secret, secret.encode().hex(), key.hex(), proof.hex(), private, hashlib.sha256(secret.encode()).hexdigest()]


@contextmanager
def watched(pids: list[int]) -> Iterator[dict[int, tuple[int, int]]]:
    """Yields the most descriptors and memory that each process gets more than it had."""
    before, most, over = {pid: size(pid) for pid in pids}, dict.fromkeys(pids, (0, 0)), threading.Event()

    def look() -> None:
        while not over.wait(0.1):
            for pid in pids:
                try:
                    now = size(pid)
                except (OSError, StopIteration):  # it has ended
                    continue
                more = (now[0] - before[pid][0], now[1] - before[pid][1])
                most[pid] = max(most[pid][0], more[0]), max(most[pid][1], more[1])

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        yield most
    finally:
        over.set()
        looking.join()


@pytest.fixture
def descriptors() -> Iterator[None]:
    """Enough of them for an attack."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, before[1]) if before[1] != resource.RLIM_INFINITY else 4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize("tls", [False, True])
def test_an_outsider_on_the_network_neither_ends_nor_stalls_a_job_and_learns_nothing(hosts: Cluster, tls: bool) -> None:
    steps = STEPS * 4
    options: dict[str, Any] = {"tls": True} if tls else {}
    first = hosts.host(steps, {}, 0.05, hosts_min=2, **options)
    first.until("waiting for 1 more host")
    second = hosts.host(steps, {}, 0.05, **options)
    first.has_members()
    second.has_members()
    pids = processes(first.directory, second.directory)
    places = [address for each in listening(pids).values() for address in each]
    assert len(places) == 6, "two agents and four workers listen"
    with watched(pids) as most, Stranger(places) as stranger:
        assert first.result(_LONG_S) == second.result() == calm(steps)
    assert kinds(first) == set()
    assert stranger.connections > 1000
    assert stranger.slow, "a slow one was closed"
    for answer in stranger.answers:
        assert answer[:8] in (b"", b"elastls2" if tls else b"elastic2")
        assert len(answer) in (0, 40, 72)
        assert not any(answer[40:]), "nothing but a random number, and a refusal"
    assert max(descriptors for descriptors, _ in most.values()) <= ROOM
    assert max(memory for _, memory in most.values()) <= ROOM_BYTES


def intrusion(pids: list[int], paths: list[Path], texts: list[str]) -> dict[str, list[str]]:
    told = json.dumps({"pids": pids, "paths": [str(path) for path in paths], "texts": texts})
    done = subprocess.run([sys.executable, str(INTRUDER)], input=told, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_another_user_of_the_host_reads_reaches_and_disturbs_nothing(hosts: Cluster, leftovers: Any) -> None:
    """He can enter the folders in which the job's own are."""
    leftovers.directory.chmod(0o755)
    steps = STEPS * 3
    first = hosts.host(steps, {}, 0.05, hosts_min=2, tls=True)
    first.until("waiting for 1 more host")
    second = hosts.host(steps, {}, 0.05, tls=True)
    first.has_members()
    second.has_members()
    paths = [first.directory, second.directory, hosts.secret()]
    told = intrusion(processes(first.directory, second.directory), paths, forms(SECRET))
    assert told == {"succeeded": [], "found": []}
    assert first.result(_LONG_S) == second.result() == calm(steps)
    assert kinds(first) == set()
    assert_nowhere(forms(SECRET), hosts, [first, second])


def assert_nowhere(texts: list[str], made: Cluster, started: list[Host]) -> None:
    """No form of the secret is in etcd, in what agents said, or in files of the job."""
    client = EtcdClient(EtcdEndpoint.parse(made.etcd))
    try:
        stored = "".join(f"{entry.key} {entry.value}" for entry in client.get_prefix("/"))
    finally:
        client.close()
    files = [path for host in started for path in (host.out, host.err, *host.directory.rglob("*")) if path.is_file()]
    written = stored + "".join(path.read_text(errors="replace") for path in files)
    assert [text for text in texts if text in written] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_nor_does_he_with_a_job_of_one_host_and_its_private_etcd(leftovers: Any) -> None:
    leftovers.directory.chmod(0o755)
    directory = leftovers.directory / "run"
    command = [sys.executable, "-m", "elastic.cli.main", "run", "--workers", "2", "--directory", str(directory), f"{SCRIPT}:train"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([*command, str(STEPS * 3), "{}", "0.05"], stdout=subprocess.PIPE, text=True, env=environment) as job:
        host = Host(job, directory, directory / "out", leftovers.directory / "none")
        host.has_members()
        pids = [pid for pid, command in leftovers.processes().items() if pid != job.pid]
        assert len(pids) >= 5, "agent, fork server, etcd and two workers"
        told = intrusion(pids, [directory], [])
        assert told == {"succeeded": [], "found": []}
        assert host.process.communicate(timeout=120)[0]
        assert job.returncode == 0
    shutil.rmtree(directory)
