"""Tests that a host is checked before it joins: one that is faulty, too small, of another version or out of reach is refused, with the
reason on both sides, and the job goes on."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.hosts.agents import ROOT, Cluster, Host, cluster
from tests.hosts.namespaces import etcd_at, network
from tests.hosts.test_hosts import STEPS, hosts  # noqa: F401  (a fixture)

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("leftovers")]

FAULTS = {
    # Kernels for another instruction set than the job's, of which the environment shows nothing.
    "bits": "os.environ['MKL_CBWR'], kept = 'COMPATIBLE', os.environ['MKL_CBWR']\nimport torch\ntorch.ones(64, 64) @ torch.ones(64, 64)\n"
    "os.environ['MKL_CBWR'] = kept",
    "version": "import torch\ntorch.__version__ = torch.torch_version.TorchVersion('2.1.0')",
    "crash": "import elastic.worker.node_check as check\ncheck.measured = lambda threads: os.kill(os.getpid(), 4)",
    "slow": "import elastic.worker.node_check as check\nfast = check.measured\n"
    "check.measured = lambda threads: {**(found := fast(threads)), 'seconds': 100 * found['seconds']}",
    "slow at first": "import pathlib\nimport elastic.worker.node_check as check\nfast = check.measured\n"
    "def slow_once(threads):\n"
    "    found, mark = fast(threads), pathlib.Path(os.environ['ONCE'])\n"
    "    first = not mark.exists()\n"
    "    mark.touch()\n"
    "    return {**found, 'seconds': 100 * found['seconds']} if first else found\n"
    "check.measured = slow_once",
}


def faulty(folder: Path, fault: str) -> list[str]:
    """Words before a command, whose fork server then has a fault that is there before anything of the runtime is imported."""
    code = folder / fault
    code.mkdir()
    text = f"import os, sys\nif any('elastic.agent.forkserver' in each for each in sys.orig_argv):\n    exec({FAULTS[fault]!r})\n"
    (code / "sitecustomize.py").write_text(text)
    return ["env", f"PYTHONPATH={code}:{ROOT}"]


def refused(made: Cluster, why: str, code: int, within: list[str], **options: object) -> None:
    """Runs a job of one host, to which another one comes in vain."""
    first = made.host(STEPS * 20, {}, 0.05, workers=1)
    first.has_members()
    second = made.host(STEPS * 20, {}, 0.05, workers=1, within=within, **options)
    assert why in second.failure(code)
    assert "this host cannot take part in the job job: " in second.said
    assert f"is refused: {second.said.rpartition('in the job job: ')[2].strip()}" in first.said
    first.process.terminate()
    assert first.process.wait(60) == 143, first.said


@pytest.mark.parametrize(
    ("fault", "code", "why"),
    [
        ("bits", 3, "its processor computes other bits: a test product of matrices has the digest"),
        ("version", 2, "its torch is 2.1.0, and the job's"),
        ("crash", 3, "a test product of matrices failed there: its process ended without a result"),
        ("slow", 3, "times as slow as that of the host that coordinates the job"),
    ],
)
def test_a_faulty_host_is_refused(hosts: Cluster, fault: str, code: int, why: str) -> None:  # noqa: F811
    refused(hosts, why, code, faulty(hosts.folder, fault))


def test_a_host_that_is_slow_for_a_moment_is_measured_again(hosts: Cluster) -> None:  # noqa: F811
    first = hosts.host(STEPS * 20, {}, 0.05, workers=1)
    first.has_members()
    second = hosts.host(STEPS * 20, {}, 0.05, workers=1, within=[*faulty(hosts.folder, "slow at first"), f"ONCE={hosts.folder / 'once'}"])
    second.has_members()
    assert first.said.count("is measured again: its processor is ") == 1
    assert "refused" not in first.said
    for each in (second, first):
        each.process.terminate()
        assert each.process.wait(60) == 143, each.said


@pytest.mark.parametrize(
    ("total", "free", "why"),
    [
        (4_000_000, 100_000, "1 worker of this job need"),
        (150_000, 4_000_000, "1 worker share 138 MB there, and with them the model does not fit"),
    ],
)
def test_a_host_without_memory_is_refused(hosts: Cluster, total: int, free: int, why: str) -> None:  # noqa: F811
    meminfo = hosts.folder / "meminfo"
    meminfo.write_text(f"MemTotal: {total} kB\nMemFree: {free} kB\nMemAvailable: {free} kB\n")
    within = ["unshare", "-m", "sh", "-c", f'mount --bind {meminfo} /proc/meminfo && exec "$@"', "sh"]
    if subprocess.run([*within, "true"], check=False, capture_output=True).returncode:
        pytest.skip("mounts are not permitted here")
    refused(hosts, why, 3, within)


def test_hosts_that_cannot_reach_each_other_are_both_named(tmp_path: Path) -> None:
    """The third host reaches the first, which coordinates, and not the second; then only in one direction."""
    with network(3) as net, etcd_at(net.gateway, tmp_path / "etcd") as etcd, cluster(tmp_path / "cluster", etcd) as made:

        def host(number: int) -> Host:
            return made.host(STEPS * 20, {}, 0.05, workers=1, within=net.command(number))

        both = [host(0)]
        both[0].has_members()
        both.append(host(1))
        both[1].has_members()
        names = {number: each.said for number, each in enumerate(both)}
        assert not any("refused" in said for said in names.values())
        route = [*net.command(2), "ip", "route", "add", "blackhole", f"{net.subnet}.2/32"]
        subprocess.run(route, check=True)
        third = host(2)
        said = third.failure(3)
        assert "this host cannot take part in the job job: host " in said
        assert " cannot reach host " in said
        assert "let every host reach every port of the others" in said
        assert " is refused: host " in both[0].said
        for each in reversed(both):  # the last one stops the job
            each.process.terminate()
            assert each.process.wait(60) == 143, each.said


def test_a_host_that_cannot_reach_the_coordinator_gives_up_and_names_both(tmp_path: Path) -> None:
    with network(2) as net, etcd_at(net.gateway, tmp_path / "etcd") as etcd, cluster(tmp_path / "cluster", etcd) as made:
        first = made.host(STEPS * 20, {}, 0.05, workers=1, within=net.command(0))
        first.has_members()
        subprocess.run([*net.command(1), "ip", "route", "add", "blackhole", f"{net.subnet}.1/32"], check=True)
        second = made.host(STEPS * 20, {}, 0.05, workers=1, within=net.command(1))
        second.until("has not been reached for")
        said = second.failure(3)
        assert f"({net.subnet}.2) has not reached host " in said
        assert f", which coordinates the job, at {net.subnet}.1:" in said
        assert "Let every host reach every port of the others" in said
        first.process.terminate()
        assert first.process.wait(60) == 143, first.said
