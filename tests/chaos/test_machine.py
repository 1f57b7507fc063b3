"""Tests what the harness does where the machine does not permit namespaces, delays of the kernel, or mounts."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic.chaos import trial
from elastic.chaos.inject import disk
from elastic.chaos.inject import network as faults
from elastic.chaos.injection import parse
from elastic.chaos.namespaces import Network
from elastic.chaos.proxies import Proxies
from elastic.chaos.scene import Effect, NoEffect
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


def test_a_machine_without_the_program_for_namespaces_gets_proxies(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nowhere")
    made, (notice,) = network("partition@3")
    assert isinstance(made, Proxies)
    assert "No such file or directory: 'ip'" in notice


@pytest.fixture
def proxies() -> Iterator[Proxies]:
    made = Proxies(1)
    made.make()
    yield made
    made.remove()


def test_a_host_behind_a_proxy_is_seen_to_be_cut_and_late(proxies: Proxies):
    assert proxies.reached_s(0, 0) is not None
    proxies.cut(0)
    assert proxies.reached_s(0, 0, 0.05) is None
    proxies.heal(0)
    proxies.delay(0, 20.0)
    assert (proxies.reached_s(0, 0) or 0.0) >= 0.02


class Wires:
    """A network whose wires do nothing that they are told; `answers` are the seconds of each try to reach somebody, the last for ever."""

    def __init__(self, *answers: float | None) -> None:
        self.answers = [*answers]

    def reached_s(self, *_: object) -> float | None:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def cut(self, _: int) -> None: ...

    heal = cut

    def delay(self, *_: object) -> None: ...


def injected(fault: str, *answers: float | None) -> Effect:
    """What becomes of a fault of a network that answers so."""
    host = SimpleNamespace(number=0, targets=list, cut=False)
    job = SimpleNamespace(network=Wires(*answers), etcd=None)
    nothing: Any = SimpleNamespace(job=job, host=lambda _: host, losing=lambda *_: None, last=lambda _: None)
    effect = Effect(parse(fault))
    getattr(faults, effect.injection.kind)(nothing, effect)
    return effect


@pytest.mark.parametrize(
    ("fault", "answers", "why"),
    [
        ("partition@3", (0.001,), "host 0 still reached others"),
        ("partition@3", (None,), "host 0 did not reach others before the fault"),
        ("delay@3 factor=20", (0.001,), "an answer to host 0 took only 1.0 ms"),
        ("delay@3 factor=20", (0.001, 0.5, 0.001, 0.5), "an answer to host 0 took only 1.0 ms"),
        ("delay@3 factor=20", (None,), "host 0 did not reach others before the fault"),
    ],
)
def test_a_fault_of_the_network_that_did_nothing_has_no_proof(fault: str, answers: tuple[float | None, ...], why: str):
    with pytest.raises(NoEffect, match=why):
        injected(fault, *answers)


def test_a_fault_of_the_network_is_proven_by_what_a_host_reaches():
    assert injected("partition@3", 0.001, None).proof == "host 0 reached nobody, and had just before"
    assert injected("delay@3 factor=20", 0.001, 0.021).proof == "an answer to host 0 took 21.0 ms"
