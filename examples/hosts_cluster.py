"""The hosts of `examples/hosts.py`: each runs one `elastic agent`, and what it says of the job is read from its files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from etcd_members import Etcd

from elastic.chaos.namespaces import Network
from elastic.chaos.proxies import Proxies

WORKERS = 2
_ROOT, _HERE = Path(__file__).parents[1], Path(__file__).parent
_ELASTIC = [sys.executable, "-m", "elastic.cli.main"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), str(_HERE)])}


def parent(pid: int | None) -> int | None:
    """Returns the parent of a process; None if it has ended."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


@dataclass
class Host:
    """One host: its number, the folder of its files, and the process that runs `elastic agent`."""

    number: int
    folder: Path
    process: subprocess.Popen[bytes]
    log: Path
    cut: bool = False

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def members(self) -> dict[str, Any]:
        """The members of the newest view that this host knows; empty before the first."""
        with suppress(OSError):
            return json.loads((self.folder / "members.json").read_text())
        return {"epoch": 0, "members": [], "forkserver": None}

    @property
    def workers(self) -> dict[int, int]:
        """The members on this host, with their processes."""
        known = self.members
        return {each["worker"]: each["pid"] for each in known["members"] if each["pid"] and parent(each["pid"]) == known["forkserver"]}

    @property
    def name(self) -> str | None:
        """Its name in the job, of its present agent."""
        mine = self.workers
        return next((each["host"] for each in self.members["members"] if each["worker"] in mine), None)

    @property
    def incidents(self) -> list[dict[str, Any]]:
        with suppress(OSError):
            lines = (self.folder / "incidents.jsonl").read_text().splitlines(keepends=True)
            return [json.loads(line) for line in lines if line.endswith("\n")]
        return []

    @property
    def step(self) -> int:
        """The newest step that one of its workers was given; -1 before the first."""
        return max((_last_step(path) for path in self.folder.glob("steps-*.jsonl")), default=-1)


def _last_step(path: Path) -> int:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        whole = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"}\n")]
    return json.loads(whole[-1])["step"] if whole and whole[-1].startswith(b"{") else -1


@dataclass
class Cluster:
    """Starts hosts of the job `gpt` that run `target`."""

    network: Network | Proxies
    etcd: Etcd
    folder: Path
    target: str
    arguments: list[str]
    patience_s: float
    hosts: list[Host] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    recorded: list[dict[str, Any]] = field(default_factory=list)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {text}", flush=True)

    @property
    def present(self) -> list[Host]:
        """The hosts that should take part now."""
        return [host for host in self.hosts if host.alive and not host.cut]

    def add(self, least: int = 1) -> Host:
        """Starts `elastic agent` on a new host. It founds the job with `least` hosts, or joins it."""
        number = len(self.hosts)
        log, folder = self.folder / f"host{number}.txt", self.folder / f"host{number}"
        flags = ["--job", "gpt", "--secret-file", str(self.folder / "secret"), "--workers", str(WORKERS), "--hosts-min", str(least)]
        flags += ["--stages", "2", "--directory", str(folder), *self.network.options(number)]
        etcd = self.etcd.options(self.network.etcd_ports(number, self.etcd.ports))
        command = [*self.network.command(number), *_ELASTIC, "agent", *etcd, *flags, self.target, *self.arguments]
        environment = {**ENVIRONMENT, **self.network.environment(number)}
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment)
        self.hosts.append(Host(number, folder, process, log))
        return self.hosts[-1]

    def ask(self, *words: str) -> str:
        """Runs `elastic status`, `drain` or `stop`, and returns what it prints. Raises CalledProcessError if it is refused."""
        what, *more = words
        command = [*_ELASTIC, what, "gpt", *more, *self.etcd.options(), "--secret-file", str(self.folder / "secret")]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT, timeout=self.patience_s).stdout

    def coordinator(self) -> Host:
        """Returns the host whose agent coordinates the job."""
        name = json.loads(self.ask("status", "--json"))["coordinator"]
        return next(host for host in self.present if host.name == name)

    @property
    def incidents(self) -> list[dict[str, Any]]:
        """The job's incidents, also when it has ended: every host has the log, some may not have its end yet."""
        self.recorded = max((host.incidents for host in self.present), key=len, default=self.recorded)
        return self.recorded

    def ended(self, hosts: Sequence[Host]) -> None:
        """Notes what these hosts, with which the job has ended, have recorded; their files are removed soon."""
        self.recorded = max((host.incidents for host in hosts), key=len, default=self.recorded)

    def until(self, what: str, met: Callable[[], Any]) -> Any:
        """Waits until the condition is met and returns it. Raises RuntimeError if that takes too long, or if no host is left."""
        deadline = time.monotonic() + self.patience_s
        while not (found := met()):
            if time.monotonic() > deadline or not self.present:
                raise RuntimeError(f"this did not happen in {self.patience_s:g} s: {what}")
            time.sleep(0.03)
        return found

    def complete(self) -> bool:
        """Whether every present host, and no other, trains with all its workers."""
        epochs = {host.members["epoch"] for host in self.present}
        known = self.present[0].members["members"]
        return len(epochs) == 1 and len(known) == WORKERS * len(self.present) and all(len(host.workers) == WORKERS for host in self.present)

    def settle(self, steps: int = 5) -> None:
        """Waits until all hosts train, and have trained for some steps, so that there are copies of all state again."""
        self.until("all hosts train", self.complete)
        before = self.present[0].step
        self.until("training goes on", lambda: self.complete() and min(host.step for host in self.present) >= before + steps)

    def kill(self, host: Host) -> None:
        """Ends all processes of a host at once, as if its power was cut: its workers end with their agent."""
        agent = host.members.get("agent")
        if agent is not None and parent(agent) == host.process.pid:
            os.kill(agent, signal.SIGKILL)
        host.process.kill()
        host.process.wait()

    def close(self) -> None:
        """Ends all hosts."""
        for host in self.hosts:
            self.kill(host)
