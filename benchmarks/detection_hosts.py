"""Faults of whole hosts for `detection.py`: three network namespaces are the hosts of a job, with an etcd of default timing beside them.

Every job has one fault. The time of the fault and all figures are of one clock, since all hosts are on this machine. `noticed` is the time
until the agent that coordinates acts on it (after the loss of the coordinator: another one), `running` the time until all members run in
the next view, and `gap` the longest time between two steps in that period, less the usual one, as a loop body sees it.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from elastic.chaos.namespaces import Network, etcd_at

HOSTS, WORKERS, STEPS, PAUSE_S = 3, 2, 160, 0.03
_TRAIN = Path(__file__).resolve().parent / "detection_train.py"
_WAIT_S = 300.0


@dataclass
class Host:
    """One run of `elastic agent` in a network namespace."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def agent(self) -> int:
        return json.loads((self.folder / "run" / "members.json").read_text())["agent"]

    @property
    def workers(self) -> list[int]:
        """The numbers of this host's workers, which hosts get in the order in which they arrive."""
        return sorted(int(each.name) for each in (self.folder / "run" / "activity").iterdir())

    @property
    def said(self) -> str:
        return (self.folder / "err").read_text()

    @property
    def incidents(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "run" / "incidents.jsonl").read_text().splitlines()]

    def end(self) -> None:
        """Kills agent and launcher; the workers die with the agent."""
        with suppress(OSError, ValueError):
            os.kill(self.agent, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


@dataclass
class Job:
    """A job on three hosts; the first one coordinates."""

    net: Network
    hosts: list[Host]


def _kill(host: int) -> Callable[[Job], None]:
    def act(job: Job) -> None:
        os.kill(job.hosts[host].agent, signal.SIGKILL)
        job.hosts[host].process.kill()  # its launcher would start another one

    return act


def _split(*, both: bool) -> Callable[[Job], None]:
    """The last host's packets to the others are lost, and with `both` theirs to it; all still reach etcd."""

    def act(job: Job) -> None:
        for other in range(HOSTS - 1):
            job.net.mute(HOSTS - 1, other)
            if both:
                job.net.mute(other, HOSTS - 1)

    return act


HOST_FAULTS: dict[str, tuple[int, Callable[[Job], None]]] = {
    "agent killed": (2, _kill(2)),
    "host vanished": (2, lambda job: job.net.cut(2)),
    "network split": (2, _split(both=True)),
    "network split one way": (2, _split(both=False)),
    "coordinator killed": (0, _kill(0)),
    "coordinator vanished": (0, lambda job: job.net.cut(0)),
    "drained": (2, lambda job: job.hosts[2].process.send_signal(signal.SIGTERM)),
}
"""By kind: the host that is lost, and what happens."""


def _until(there: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline:
        with suppress(OSError, ValueError):
            if found := there():
                return found
        time.sleep(0.01)
    raise SystemExit(f"{what}: not within {_WAIT_S:g} s")


def _start(net: Network, number: int, etcd: str, folder: Path, args: list[Any]) -> Host:
    folder.mkdir()
    words = ["agent", "--etcd", etcd, "--job", "job", "--workers", WORKERS, "--secret-file", folder.parent / "secret"]
    words += ["--directory", folder / "run", "--hosts-min", HOSTS, f"{_TRAIN}:train", *map(json.dumps, args)]
    command = [*net.command(number), sys.executable, "-m", "elastic.cli.main", *map(str, words)]
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        environment = {**os.environ, "PYTHONPATH": str(_TRAIN.parents[1])}
        process = subprocess.Popen(command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=environment)
    return Host(process, folder)


@contextmanager
def job_on_hosts(args: list[Any]) -> Iterator[Job]:
    """Runs a job on three hosts, and yields it once all members train."""
    with tempfile.TemporaryDirectory(prefix="elastic-bench-") as name:
        folder, hosts = Path(name), list[Host]()
        (folder / "secret").write_text("5" * 40)
        (folder / "secret").chmod(0o600)
        net = Network(f"d{os.getpid() % 100000}h", HOSTS, f"10.{os.getpid() // 250 % 250}.{os.getpid() % 250}")
        try:
            net.make()
            with etcd_at(net.gateway, folder / "etcd") as etcd:
                for number in range(HOSTS):
                    hosts.append(_start(net, number, etcd, folder / str(number), args))
                    if number == 0:
                        _until(lambda: "waiting for" in hosts[0].said, "the first host")
                for host in hosts:
                    _until(lambda host=host: host.agent, "the first view")
                yield Job(net, hosts)
        finally:
            for host in hosts:
                host.end()
            net.remove()


def once(kind: str) -> dict[str, Any]:
    """Runs one job with this fault, and returns its figures."""
    lost, fault = HOST_FAULTS[kind]
    with job_on_hosts([STEPS, PAUSE_S]) as job:
        time.sleep(1.5)
        workers = job.hosts[lost].workers
        at = time.monotonic()
        fault(job)
        result = _result(job.hosts[1])
        found = next(each for each in job.hosts[1].incidents if each["kind"] in ("death", "eviction", "drain"))
    if sorted([found["worker"], *found["also"]]) != workers:
        raise SystemExit(f"{kind}: workers {found['worker']} and {found['also']} were lost")
    noticed, running = (found["at"] + found[name] / 1000 - at for name in ("detected_ms", "running_ms"))
    steps = [(end - begin, begin) for begin, end in zip(result["at"], result["at"][1:], strict=False)]
    usual = statistics.median(seconds for seconds, _ in steps)
    gap = max(seconds for seconds, begin in steps if at - 1.0 < begin < at + running + 1.0) - usual
    figures = {"noticed_s": noticed, "running_s": running, "gap_s": gap, "steps_redone": found["steps_redone"], "step_s": usual}
    return {**figures, "digest": result["digest"], "incident": found}


def _result(host: Host) -> dict[str, Any]:
    if host.process.wait(_WAIT_S):
        raise SystemExit(f"a host that was not lost has failed: {host.said}")
    return json.loads((host.folder / "out").read_text().splitlines()[-1])


def measured(kind: str, repeats: int, digest: str) -> dict[str, Any]:
    """Runs jobs with this fault, checks that they end with this digest, and returns the medians."""
    runs = [once(kind) for _ in range(repeats)]
    if {run["digest"] for run in runs} != {digest}:
        raise SystemExit(f"{kind}: a digest differs from that of the undisturbed run")
    names = ("noticed_s", "running_s", "gap_s", "steps_redone", "step_s")
    medians = {name: statistics.median(run[name] for run in runs) for name in names}
    most = {f"{name}_most": max(run[name] for run in runs) for name in ("noticed_s", "gap_s", "steps_redone")}
    return {"kind": kind, **medians, **most, "runs": runs}


def paused(seconds: float) -> dict[str, Any]:
    """Stops all workers of a job on three hosts at the same time, for so long; returns whom it lost."""
    with job_on_hosts([STEPS, PAUSE_S]) as job:
        time.sleep(1.5)
        members = json.loads((job.hosts[0].folder / "run" / "members.json").read_text())["members"]
        pids = [member["pid"] for member in members]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        _result(job.hosts[0])
        lost = [each for each in job.hosts[0].incidents if each["kind"] in ("death", "eviction")]
    return {"paused_s": seconds, "workers": len(pids), "excluded": lost}
