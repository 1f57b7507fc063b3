"""A job on three hosts, which are network namespaces with an etcd of default timing beside them, for `detection_hosts.py`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from elastic.chaos.namespaces import Network, etcd_at

HOSTS, WORKERS, PAUSE_S = 3, 2, 0.03
_TRAIN = Path(__file__).resolve().parent / "detection_train.py"
_WAIT_S = 300.0
_COORDINATES = "coordinates the job now"
_SETTLED = 20  # steps of a new member, about a second
_AHEAD = 20  # steps from the order to stop until all stop: workers are one step apart at most


@dataclass
class Host:
    """One run of `elastic agent` in a network namespace."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def members(self) -> dict[str, Any]:
        """The content of its `members.json`."""
        return json.loads((self.folder / "run" / "members.json").read_text())

    @property
    def agent(self) -> int:
        return self.members["agent"]

    @property
    def workers(self) -> list[int]:
        """The numbers of the members on this host."""
        here = {int(each.name) for each in (self.folder / "run" / "activity").iterdir()}
        return sorted(here.intersection(each["worker"] for each in self.members["members"]))

    @property
    def said(self) -> str:
        return (self.folder / "err").read_text()

    @property
    def incidents(self) -> list[dict[str, Any]]:
        """The job's incidents."""
        with suppress(FileNotFoundError):
            return [json.loads(line) for line in (self.folder / "run" / "incidents.jsonl").read_text().splitlines()]
        return []

    def end(self) -> None:
        """Kills agent and launcher; the workers die with the agent."""
        with suppress(OSError, ValueError):
            os.kill(self.agent, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


@dataclass
class Job:
    """A job on three hosts, by place; `coordinator` is the place of the one that coordinates. `times` has a file for each worker."""

    net: Network
    etcd: str
    folder: Path
    hosts: list[Host] = field(default_factory=list)
    coordinator: int = 0
    lost: list[int] = field(default_factory=list)  # places, in the order in which they were lost

    @property
    def times(self) -> Path:
        return self.folder / "times"

    def others(self, place: int) -> list[Host]:
        """The hosts at the other places."""
        return [host for number, host in enumerate(self.hosts) if number != place]

    def any_other(self) -> int:
        """Returns the place, of those that do not coordinate, that was lost longest ago."""
        places = [place for place in range(HOSTS) if place != self.coordinator]
        return min(places, key=lambda place: (max([-1, *(when for when, each in enumerate(self.lost) if each == place)]), -place))

    def start(self, place: int) -> None:
        """Starts a host at a place, where there was none or one that has ended."""
        folder = self.folder / f"{place}-{len(self.lost)}"
        folder.mkdir()
        words = ["agent", "--etcd", self.etcd, "--job", "job", "--workers", WORKERS, "--secret-file", self.folder / "secret"]
        words += ["--directory", folder / "run", "--hosts-min", HOSTS, f"{_TRAIN}:until_stopped", json.dumps(str(self.times)), PAUSE_S]
        command = [*self.net.command(place), sys.executable, "-m", "elastic.cli.main", *map(str, words)]
        with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
            environment = {**os.environ, "PYTHONPATH": str(_TRAIN.parents[1])}
            process = subprocess.Popen(command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=environment)
        self.hosts[place : place + 1] = [Host(process, folder)]

    def until_all_train(self, seen_by: Host) -> None:
        """Waits until all hosts have their members, as one of them knows, and each member has taken some steps."""

        def trains() -> bool:
            members = [each["worker"] for each in seen_by.members["members"]]
            return len(members) == HOSTS * WORKERS and all(len(self.steps(each)) >= _SETTLED for each in members)

        until(trains, "all members")

    def coordinating(self, place: int, before: dict[int, int]) -> None:
        """Notes which host coordinates after the one at `place` is lost; `before` has what hosts had said of that."""
        others = [other for other in range(HOSTS) if other != place]
        self.coordinator = until(
            lambda: next(([other] for other in others if self.hosts[other].said.count(_COORDINATES) > before[other]), None), "a coordinator"
        )[0]

    def told(self) -> dict[int, int]:
        """Returns how often each host has said that it coordinates now."""
        return {place: host.said.count(_COORDINATES) for place, host in enumerate(self.hosts)}

    def steps(self, worker: int) -> list[tuple[int, float]]:
        """Returns when the loop body of a worker began, by step."""
        lines = (self.times / str(worker)).read_text().splitlines()
        return [(int(step), float(at)) for step, at in (line.split() for line in lines)]

    def stop(self) -> dict[str, Any]:
        """Stops the job some steps from now; returns the step and the digest, which every host prints."""
        step = max(self.steps(worker)[-1][0] for worker in self.hosts[self.coordinator].workers) + _AHEAD
        (self.times / "new").write_text(str(step))
        (self.times / "new").rename(self.times / "stop")
        found = []
        for host in self.hosts:
            if host.process.wait(_WAIT_S):
                raise SystemExit(f"a host has failed: {host.said}")
            found.append(json.loads((host.folder / "out").read_text().splitlines()[-1]))
        if found[1:] != found[:-1]:
            raise SystemExit(f"the hosts print different results: {found}")
        return found[0]


def until(there: Callable[[], Any], what: str) -> Any:
    """Waits for something that is true, and returns it."""
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline:
        with suppress(OSError, ValueError, KeyError):
            if found := there():
                return found
        time.sleep(0.01)
    raise SystemExit(f"{what}: not within {_WAIT_S:g} s")


@contextmanager
def job_on_hosts() -> Iterator[Job]:
    """Runs a job on three hosts, and yields it once all members train; the first host coordinates."""
    with tempfile.TemporaryDirectory(prefix="elastic-bench-") as name:
        folder = Path(name)
        (folder / "secret").write_text("5" * 40)
        (folder / "secret").chmod(0o600)
        (folder / "times").mkdir()
        net = Network(f"d{os.getpid() % 100000}h", HOSTS, f"10.{os.getpid() // 250 % 250}.{os.getpid() % 250}")
        job = Job(net, "", folder)
        try:
            net.make()
            with etcd_at(net.gateway, folder / "etcd") as job.etcd:
                for place in range(HOSTS):
                    job.start(place)
                    if place == 0:
                        until(lambda: "waiting for" in job.hosts[0].said, "the first host")
                for host in job.hosts:
                    job.until_all_train(host)
                yield job
        finally:
            for host in job.hosts:
                host.end()
            net.remove()
