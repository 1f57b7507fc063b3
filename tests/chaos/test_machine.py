"""Tests what the harness does where the machine does not permit namespaces, delays of the kernel, or mounts."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from elastic.chaos import trial
from elastic.chaos.inject import disk
from elastic.chaos.injection import parse
from elastic.chaos.namespaces import Network
from elastic.chaos.proxies import Proxies
from elastic.chaos.schedule import JobSpec, Schedule
from elastic.errors import SettingsError

REFUSED = subprocess.CalledProcessError(1, ["ip"], stderr=b"mount --make-shared /run/netns failed: Operation not permitted\n")


def refuses(*_: Any, **__: Any) -> None:
    raise REFUSED


def network(*faults: str) -> tuple[Network | Proxies, list[str]]:
    """The network that two hosts get, and what is said of it."""
    notices = list[str]()
    schedule = Schedule(job=JobSpec(hosts=2), injections=tuple(map(parse, faults)))
    with trial._network(schedule, notices) as made:
        return made, notices


@pytest.fixture
def no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks are neither made nor removed, and delays are refused."""
    for name in ("make", "remove"):
        monkeypatch.setattr(Network, name, lambda _: None)
    monkeypatch.setattr(Network, "delay", refuses)


@pytest.mark.usefixtures("no_programs")
def test_without_permission_for_namespaces_hosts_get_proxies_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Network, "make", refuses)
    made, notices = network("partition@3")
    assert isinstance(made, Proxies)
    (notice,) = notices
    assert "Operation not permitted): TCP proxies take their place" in notice


@pytest.mark.usefixtures("no_programs")
@pytest.mark.parametrize(("fault", "kind"), [("delay@3", Proxies), ("partition@3", Network)])
def test_a_kernel_without_netem_matters_only_to_delays(fault: str, kind: type[Network] | type[Proxies]):
    made, notices = network(fault)
    assert isinstance(made, kind)
    assert len(notices) == (kind is Proxies)


@pytest.mark.parametrize("error", [REFUSED, FileNotFoundError("mount")], ids=["no permission", "no program"])
def test_without_permission_to_mount_a_full_disk_is_refused_before_the_run(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def run(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(disk.subprocess, "run", run)
    schedule = Schedule(job=JobSpec(), injections=(parse("disk-full@3"),))
    with pytest.raises(SettingsError, match=r"cannot mount one .*: be root, or leave it out"):
        trial.run(schedule, keep=tmp_path / "kept")
