"""Measures the control plane of a large job: how long it takes to found it, and to go on without a host that is lost.

    python benchmarks/control_plane.py --json build/control_plane.json                     # 125 hosts with 8 workers each
    python benchmarks/control_plane.py --hosts 4 --workers-per-host 8 --losses 1           # a quick run

All hosts are on this machine. Real: one agent process per host with its event loop, threads, TCP links and etcd session; the coordinator's
planning and checks; an etcd with its disk; every message, over a channel of each worker. Played: the workers of a host are one process
without torch, which answers orders as they do, with inventories of their size, and moves no state (`control_workers.py`). Proposals are
decoded and checked by the first worker of one host in `--check-every`; the others would do it at the same time on processors of their own.
Since all agents share this machine's processors, figures are worse than with a machine per host.

- found: from the moment that the last host's agent is asked to take part, while all others wait for it, until the first view has arrived
  at the last worker. Workers are started, announce themselves, and get the view in this time.
- lost: from SIGKILL of all processes of one host until the view without it has arrived at the last worker.
- cpu: processor seconds of the coordinator's agent, of the other agents and of the processes that play workers (median and largest), and of
  etcd; and what the machine's processors could give in that time. If that is nearly the sum of all, the machine is what takes the time.
  The same in a second in which nothing changes.
- etcd: requests that etcd counts (its own metrics) from just before the loss until a second after the view has arrived, without those of
  leases, which all agents renew all the time.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from control_hosts import COORDINATOR
from control_model import Shape
from report import write_json

from elastic.agent.start import Sharing
from elastic.host.channel import Channel
from elastic.host.process import tied_command
from elastic.host.rundir import RunDirectory
from elastic.launch.sharing import key_of
from elastic.membership.server import find_etcd
from elastic.settings import JobSettings, agent_environment, best_isa, etcd_environment

_HERE = Path(__file__).resolve().parent
_WAIT_S = 120.0
_TOGETHER = 8
_THERE = "is there with room for"
SECRET = "5" * 64
_AFTER_S = 1.0  # what a change still does at etcd once its view is there
_HANDLED = re.compile(r'^grpc_server_handled_total\{grpc_code="OK",grpc_method="(\w+)".*\} ([\d.e+]+)$', re.MULTILINE)
_COUNTED = ("Txn", "Put", "DeleteRange", "Range")
app = typer.Typer(add_completion=False)


def _free_ports(count: int) -> list[int]:
    socks = [socket.socket() for _ in range(count)]
    for sock in socks:
        sock.bind(("127.0.0.1", 0))
    ports = [sock.getsockname()[1] for sock in socks]
    for sock in socks:
        sock.close()
    return ports


@contextmanager
def etcd(folder: Path) -> Iterator[tuple[str, int]]:
    """Runs an etcd of one member with default settings on loopback; yields its `host:port`, and its process id."""
    client, peer = (f"127.0.0.1:{port}" for port in _free_ports(2))
    flags = {"data-dir": folder / "etcd", "listen-client-urls": f"http://{client}", "advertise-client-urls": f"http://{client}"}
    flags |= {"listen-peer-urls": f"http://{peer}", "initial-advertise-peer-urls": f"http://{peer}"}
    flags |= {"initial-cluster": f"default=http://{peer}", "log-level": "error"}
    command = tied_command([find_etcd(), *(f"--{name}={value}" for name, value in flags.items())])
    process = subprocess.Popen(
        command, env=etcd_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + _WAIT_S
        while time.monotonic() < deadline and process.poll() is None:
            with suppress(OSError):
                requests(client)
                break
        yield client, process.pid
    finally:
        process.kill()
        process.wait()


def requests(address: str) -> dict[str, int]:
    """Returns how many requests etcd has served, by method, as it counts them itself."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5.0) as answer:
        return {name: int(float(count)) for name, count in _HANDLED.findall(answer.read().decode())}


def processor_seconds(pid: int) -> float:
    """Returns the processor seconds that all threads of a process have used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Processor seconds that each process had used at a moment; `pids` are those of agent and workers, by host, the coordinator's first."""

    at: float
    pids: list[tuple[int, int]]
    used: dict[int, float]
    etcd: int

    def since(self, before: Spent) -> dict[str, Any]:
        """Returns what was used between two moments, by the hosts that were there at the second one."""
        used = {pid: seconds - before.used[pid] for pid, seconds in self.used.items()}
        agents, played = ([used[pair[which]] for pair in self.pids] for which in (0, 1))
        machine = (self.at - before.at) * len(os.sched_getaffinity(0))
        kinds = {"agent": agents[1:] or [0.0], "played": played}
        return {
            "seconds": self.at - before.at,
            "coordinator": agents[0],
            **{kind: {"median": statistics.median(each), "most": max(each)} for kind, each in kinds.items()},
            "etcd": used[self.etcd],
            "all": sum(used.values()),
            "machine": machine,
        }


@dataclass(kw_only=True)
class Hosts:
    """The job's hosts: their launchers' connections, their processes, and what their workers report."""

    folder: Path
    launchers: list[Channel]
    reports: socket.socket
    processes: list[tuple[int, int]] = field(default_factory=list)
    lost: set[int] = field(default_factory=set)
    arrived: dict[int, dict[str, dict[str, Any]]] = field(default_factory=dict)
    learnt: dict[int, set[str]] = field(default_factory=dict)
    checked: list[float] = field(default_factory=list)
    etcd: int = 0
    profiled: bool = False

    @property
    def left(self) -> set[str]:
        return {str(host) for host in range(len(self.processes)) if host not in self.lost}

    def wait(self, epoch: int, *, learnt: bool = False) -> float:
        """Waits until all workers have the view of this epoch; returns when the last one got it. With `learnt`, until they train in it."""
        there, deadline = self.learnt if learnt else self.arrived, time.monotonic() + _WAIT_S
        while not set(there.get(epoch, ())) >= self.left:
            report = self._heard(deadline)
            if "checked_s" in report:
                self.checked.append(report["checked_s"])
            elif "learnt" in report:
                self.learnt.setdefault(report["learnt"], set()).add(report["host"])
            else:
                self.arrived.setdefault(report["epoch"], {})[report["host"]] = report
        return 0.0 if learnt else max(self.arrived[epoch][host]["at"] for host in self.left)

    def until_said(self, words: str, times: int = 1) -> None:
        """Waits until agents have said this so many times."""
        deadline = time.monotonic() + _WAIT_S
        while (self.folder / "said").read_text().count(words) < times:
            if time.monotonic() > deadline:
                raise SystemExit(f"no agent says {words!r}")
            time.sleep(0.01)

    def next_profile(self) -> None:
        """Ends a part of the coordinator's profile, if there is one."""
        if self.profiled:
            os.kill(self.processes[COORDINATOR][0], signal.SIGUSR1)

    def spent(self) -> Spent:
        """Returns the processor seconds that the processes of hosts which are not lost, and etcd, have used so far."""
        left = [pids for host, pids in enumerate(self.processes) if host not in self.lost]
        used = {pid: processor_seconds(pid) for pids in left for pid in pids}
        return Spent(at=time.monotonic(), pids=left, used={**used, self.etcd: processor_seconds(self.etcd)}, etcd=self.etcd)

    def _heard(self, deadline: float) -> dict[str, Any]:
        """Returns the next report of workers. An agent that ends meanwhile, or no report until `deadline`, ends the benchmark."""
        with selectors.DefaultSelector() as selector:
            for host, launcher in enumerate(self.launchers):
                if host not in self.lost:
                    selector.register(launcher, selectors.EVENT_READ, launcher)
            selector.register(self.reports, selectors.EVENT_READ)
            while time.monotonic() < deadline:
                for key, _ in selector.select(deadline - time.monotonic()):
                    if key.data is None:
                        return json.loads(self.reports.recv(1 << 16))
                    words = [word for word in key.data.receive() if word["type"] != "trains"]
                    if words or key.data.closed:
                        raise SystemExit(f"an agent has ended: {words}")
        raise SystemExit(f"no report for {_WAIT_S:g} s; agents say: {(self.folder / 'said').read_text()[-2000:]}")

    def lose(self, host: int, workers: list[int]) -> float:
        """Kills all processes of a host; returns when. Workers of others then report broken links to `workers`, as real ones do."""
        began = time.monotonic()
        for pid in self.processes[host]:
            os.kill(pid, signal.SIGKILL)
        self.lost.add(host)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            for other in self.left:
                sock.sendto(json.dumps({"lost": workers}).encode(), str(self.folder / other / "inbox"))
        return began


@contextmanager
def hosts(folder: Path, count: int, options: dict[str, Any]) -> Iterator[Hosts]:
    """Makes the processes of all hosts, which wait for the request to take part in a job."""
    pairs = [socket.socketpair() for _ in range(count)]
    for host in range(count):
        RunDirectory(folder / str(host)).prepare()
    reports = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    reports.bind(str(folder / "reports"))
    fds = [theirs.fileno() for _, theirs in pairs]
    request = json.dumps({"folder": str(folder), "launchers": fds, **options})
    with (folder / "said").open("w") as said:
        server = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(_HERE / "control_hosts.py"), request],
            env={**agent_environment(), "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": f"{_HERE.parent}:{os.environ.get('PYTHONPATH', '')}"},
            pass_fds=fds,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
    made = Hosts(folder=folder, launchers=[Channel(ours) for ours, _ in pairs], reports=reports)
    try:
        assert server.stdout is not None
        made.processes = json.loads(server.stdout.readline())
        (folder / "pids").write_text(json.dumps(made.processes))
        for _, theirs in pairs:
            theirs.close()
        yield made
    finally:
        for pids in made.processes:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        server.kill()
        server.communicate()
        reports.close()
        for launcher in made.launchers:
            launcher.close()


def start(made: Hosts, address: str, workers: int, stages: int) -> tuple[float, Spent]:
    """Asks the coordinator's agent to begin, then the others, a few at a time; returns when the last one was asked, and what was used then.

    They share few processors: with all at once, some would be so late that they count as lost.
    """
    settings = JobSettings(
        name="large", workers=workers, train_fn="train.py:train", isa=best_isa(), stages=stages, etcd=address, shared=True, memory=1 << 40
    )
    sharing = Sharing(secret=key_of(SECRET), interface="127.0.0.1", least=len(made.launchers))
    began, spent = time.monotonic(), made.spent()
    for host, launcher in enumerate(made.launchers):
        if host == COORDINATOR + 1:
            made.until_said("waiting for")
        if host % _TOGETHER == 0 or host == len(made.launchers) - 1:
            made.until_said(_THERE, max(0, host - COORDINATOR - 1))
        if host == len(made.launchers) - 1:
            made.next_profile()
            spent = made.spent()
        began = time.monotonic()
        request = {"type": "start", "settings": settings.to_json(), "directory": str(made.folder / str(host)), "environment": {}}
        more = {"import_path": [], "argv": [], "modules": {}, "sharing": asdict(sharing), "incarnation": None}
        launcher.send({**request, **more})
    return began, spent


def _workers_of(made: Hosts, host: int) -> list[int]:
    return sorted(int(each.name) for each in (made.folder / str(host) / "activity").iterdir())


def _phases(made: Hosts, epoch: int) -> dict[str, Any]:
    """Returns the incident of the view `epoch`, as the coordinator has recorded it."""
    path, deadline = made.folder / str(COORDINATOR) / "incidents.jsonl", time.monotonic() + _WAIT_S
    while time.monotonic() < deadline:
        with suppress(OSError):
            for line in path.read_text().splitlines():
                found = json.loads(line)
                if found["epoch"] == epoch:
                    return {
                        "cause": found["kind"],
                        "detected_ms": found["detected_ms"],
                        **found["phases_ms"],
                        "also": len(found["also"]),
                        "attempts": found["attempts"],
                    }
        time.sleep(0.05)
    raise SystemExit(f"the coordinator has not recorded the change to epoch {epoch}")


@app.command()
def main(
    count: Annotated[int, typer.Option("--hosts", help="Hosts, each with an agent of its own.")] = 125,
    workers: Annotated[int, typer.Option("--workers-per-host", help="Workers of each host.")] = 8,
    stages: Annotated[int, typer.Option(help="Pipeline stages of the job.")] = 8,
    losses: Annotated[int, typer.Option(help="Hosts that are lost, one after the other.")] = 3,
    step_s: Annotated[float, typer.Option(help="Seconds of a step: workers report as often, at most four times a second.")] = 1.0,
    check_every: Annotated[int, typer.Option(help="One worker of one in so many hosts checks proposals as real workers do; 0: none.")] = 64,
    profile: Annotated[
        Path | None, typer.Option(help="Write cProfile's figures of the coordinator here, with .0 (founding), .1, ...")
    ] = None,
    path: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    keep: Annotated[bool, typer.Option(help="Keep what agents have said, and print where.")] = False,
) -> None:
    """Prints one JSON object."""
    shape = Shape()
    options = {"shape": {"blocks": shape.blocks, "dim": shape.dim}, "step_s": step_s, "check_every": check_every}
    options["profile"] = None if profile is None else str(profile.absolute())
    folder = Path(tempfile.mkdtemp(prefix="elastic-control-"))
    try:
        with ExitStack() as stack:
            address, process = stack.enter_context(etcd(folder))
            made = stack.enter_context(hosts(folder, count, options))
            made.etcd, made.profiled = process, profile is not None
            figures = measured(made, address, workers, stages, losses)
    finally:
        if keep:
            print(folder, file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    real = {"agents": count, "workers": count * workers, "processes that play workers": count, "etcd members": 1, "machines": 1}
    found = {"real": real, "hosts": count, "workers_per_host": workers, "stages": stages, "step_s": step_s, **figures}
    print(json.dumps(found))
    write_json(path, found)


def measured(made: Hosts, address: str, workers: int, stages: int, losses: int) -> dict[str, Any]:
    """Founds the job, loses hosts, and returns the figures."""
    before = requests(address)
    began, cpu = start(made, address, workers, stages)
    found_s = made.wait(1) - began
    founding, founding_cpu = counted(before, requests(address)), made.spent().since(cpu)
    made.wait(1, learnt=True)
    changes = []
    for number, host in enumerate(range(len(made.processes) - losses, len(made.processes))):
        time.sleep(2.0)  # it trains for a while
        cpu, count = made.spent(), _background(address)
        idle = made.spent().since(cpu)
        before = requests(address)
        made.next_profile()
        cpu = made.spent()
        at = made.lose(host, _workers_of(made, host))
        there = made.wait(number + 2) - at
        used = made.spent().since(cpu)
        made.next_profile()
        time.sleep(_AFTER_S)
        spent = counted(before, requests(address))
        made.wait(number + 2, learnt=True)
        figures = {"view_s": there, "cpu_s": used, "cpu_idle_s": idle, "etcd": spent, "etcd_idle_per_s": count}
        changes.append({**figures, **_phases(made, number + 2)})
    medians = {"view_s": statistics.median(each["view_s"] for each in changes)} if changes else {}
    return {
        "found_s": found_s,
        "found_cpu_s": founding_cpu,
        "found_etcd": founding,
        **medians,
        "checked_s": made.checked,
        "changes": changes,
    }


def counted(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """Returns the requests between two counts, without those that renew leases."""
    return {name: after.get(name, 0) - before.get(name, 0) for name in _COUNTED}


def _background(address: str) -> dict[str, int]:
    """Returns what etcd serves in a second in which nothing changes."""
    before = requests(address)
    time.sleep(1.0)
    return counted(before, requests(address))


if __name__ == "__main__":
    app()
