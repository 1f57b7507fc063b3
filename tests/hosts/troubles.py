"""Troubles of an etcd that several hosts use, and a job whose progress a test sees without it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import elastic
from tests.etcd_access import EtcdClient, EtcdEndpoint, change_password, etcdrpc
from tests.etcd_cluster import Cluster as Etcd
from tests.hosts import script
from tests.hosts.agents import Cluster, Host
from tests.hosts.slow import Proxy

WAIT_S = 120.0
_NO_SPACE = 1  # etcd's number of this alarm
UNREACHED = "cannot be reached"


def wait_for(met: Callable[[], Any], *hosts: Host) -> None:
    """Waits until this is so, while the hosts run."""
    deadline = time.monotonic() + WAIT_S
    while not met():
        assert time.monotonic() < deadline, [host.said for host in hosts]
        for host in hosts:
            assert host.process.poll() is None, host.said
        time.sleep(0.05)


@dataclass
class Job:
    """A job of several hosts, which trains until a test lets it end."""

    made: Cluster
    options: dict[str, Any] = field(default_factory=dict)
    hosts: list[Host] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.made.folder / "progress"

    def host(self, workers: int = 1, pause_s: float = 0.05, **options: Any) -> Host:
        """Starts a host that takes part."""
        self.folder.mkdir(exist_ok=True)
        target = f"{script.__file__}:until"
        self.hosts.append(self.made.host(str(self.folder), pause_s, workers=workers, target=target, **{**self.options, **options}))
        return self.hosts[-1]

    def founded(self) -> list[Host]:
        """Starts two hosts, which train."""
        first = self.host(hosts_min=2)
        first.until("waiting for 1 more host")
        both = [first, self.host()]
        self.advance(5)
        return both

    @property
    def step(self) -> int:
        """The newest step of any worker."""
        return max((int(path.read_text()) for path in self.folder.glob("*.step")), default=0)

    def advance(self, steps: int = 20) -> None:
        """Waits until so many more steps were taken."""
        until = self.step + steps
        wait_for(lambda: self.step >= until, *self.hosts)

    def members(self, host: Host) -> list[dict[str, Any]]:
        return json.loads((host.directory / "members.json").read_text())["members"]

    def kill_worker(self, host: Host) -> int:
        """Kills the newest worker on a host, and returns its number."""
        found = {int(path.stem): json.loads(path.read_text()) for path in self.folder.glob("*.process")}
        number = max(worker for worker, process in found.items() if process["directory"] == str(host.directory))
        os.kill(found[number]["pid"], signal.SIGKILL)
        return number

    def kill_agent(self, host: Host) -> None:
        os.kill(json.loads((host.directory / "members.json").read_text())["agent"], signal.SIGKILL)

    def kinds(self) -> list[str]:
        """The kinds of the incidents so far, as any host knows them; on a busy machine the plan may change at any time."""
        known = [host for host in self.hosts if (host.directory / "incidents.jsonl").exists()]
        found = [[each["kind"] for each in host.incidents if each["kind"] != "rebalance"] for host in known]
        return max(found, key=len, default=[])

    def ends(self) -> None:
        """Lets the job end, and compares its result with that of an undisturbed job."""
        last = self.step + 60
        (self.folder / "stop").write_text(str(last))
        results = [host.result() for host in self.hosts]
        assert results == [results[0]] * len(self.hosts)
        calm = self.made.folder / "calm"
        calm.mkdir()
        (calm / "stop").write_text(str(last))
        assert results[0] == elastic.run(script.until, workers=1, args=[str(calm)]).value


@dataclass
class Trouble:
    """One kind of trouble: how it begins and ends, and what agents say of it (nothing: etcd serves them all the time)."""

    begin: Callable[[], None]
    end: Callable[[], None]
    said: str | None = UNREACHED
    seconds: float = 12.0


def down(etcd: Etcd, seconds: float = 12.0, *, empty: bool = False) -> Trouble:
    """All members are killed, and started again, on their data or without."""

    def end() -> None:
        etcd.start(empty=empty)
        etcd.wait()

    return Trouble(etcd.kill, end, seconds=seconds)


def still(etcd: Etcd, seconds: float = 12.0) -> Trouble:
    """All members stand still: leases are expired when they go on."""
    return Trouble(lambda: etcd.signal(signal.SIGSTOP), lambda: etcd.signal(signal.SIGCONT), seconds=seconds)


def one_lost(etcd: Etcd, member: int) -> Trouble:
    return Trouble(lambda: etcd.kill(member), lambda: etcd.start(member), said=None)


def slow(proxy: Proxy, seconds: float = 20.0) -> Trouble:
    """Each answer takes 0.5 to 3 s."""

    def late(least: float, most: float) -> None:
        proxy.delay = (least, most)

    return Trouble(lambda: late(0.5, 3.0), lambda: late(0.0, 0.0), said=None, seconds=seconds)


def full(etcd: Etcd) -> Trouble:
    """It has the alarm of an etcd without space, until somebody disarms it."""

    def alarm(action: int) -> None:
        client = EtcdClient(EtcdEndpoint.parse(etcd.addresses))
        status = client._call(lambda member: member.maintenance.Status, etcdrpc.StatusRequest())
        request = etcdrpc.AlarmRequest(action=action, memberID=status.header.member_id, alarm=_NO_SPACE)
        client._call(lambda member: member.maintenance.Alarm, request)
        client.close()

    return Trouble(lambda: alarm(1), lambda: alarm(2), said="has no space left")


def password(etcd: Etcd, file: Path, old: str, new: str) -> Trouble:
    """Its password is changed, and the file of the password follows later."""

    def begin() -> None:
        change_password(EtcdEndpoint.parse(f"root:{old}@{etcd.addresses}"), new)

    def end() -> None:
        file.write_text(new)

    return Trouble(begin, end, said="its password has changed since this job began")
