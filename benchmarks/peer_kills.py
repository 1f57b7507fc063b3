"""The peers' side of the recovery benchmark: kills workers of TorchFT and torchrun, and measures the stalls from their commit logs."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from commits import StepCommit, first_of_each_step, pace, read_commits, spread, stall
from measure import BenchmarkError, Task, free_port, peer_environment, reap

from elastic.host.process import tied_command

PeerKind = Literal["torchft", "torchft-tight", "torchft-defaults", "torchrun"]
PEERS: dict[PeerKind, str] = {
    "torchft": "TorchFT, its example's timeouts: heartbeat 5 s, Gloo 5 s",
    "torchft-tight": "TorchFT, heartbeat 1 s, Gloo 2 s",
    "torchft-defaults": "TorchFT, its library's defaults: heartbeat 5 s, Gloo 60 s",
    "torchrun": "torchrun, DDP, a checkpoint a step",
}
TIMEOUTS: dict[PeerKind, tuple[float, float]] = {"torchft": (5, 5), "torchft-tight": (1, 2), "torchft-defaults": (5, 60)}
"""Timeouts of the lighthouse's heartbeat and of Gloo, in seconds. TorchFT stalls for the longer of the two.

A survivor without a connection to the dead replica waits in its all-reduce until Gloo's timeout. Without this survivor, no quorum forms
before the heartbeat timeout. Gloo's timeout must exceed the longest wait of a healthy all-reduce for the slowest replica.
"""

_HERE = Path(__file__).resolve().parent
_STEADY = 4  # steps that all workers commit before a kill
_PATIENCE_S = 150.0
_LOOK_S = 0.05
_ENDLESS = 2000  # steps; the benchmark ends the peers long before


def missing(kind: PeerKind) -> str | None:
    """Returns why this peer cannot run here; None if it can."""
    if kind != "torchrun" and importlib.util.find_spec("torchft") is None:
        return "torchft cannot be imported: pip install '.[bench]'"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerKills:
    """The result of a peer's run. `kills` has figures per kill, in milliseconds; `crashed` counts processes that ended without a kill."""

    kind: PeerKind
    task: Task
    kills: list[dict[str, Any]]
    crashed: int

    def to_json(self) -> dict[str, Any]:
        return {
            "side": self.kind,
            "name": PEERS[self.kind],
            "timeouts_s": dict(zip(("heartbeat", "gloo"), TIMEOUTS.get(self.kind, ()), strict=False)),
            "workers": self.task.workers,
            "batch": self.task.batch,
            "kills": len(self.kills),
            "crashed": self.crashed,
            **{name: spread(kill[name] for kill in self.kills) for name in ("stall_ms", "silence_ms", "lost_ms", "step_ms", "replaced_ms")},
            "samples_lost": sum(kill["samples_lost"] for kill in self.kills),
            "each": self.kills,
        }


class PeerGroup(Protocol):
    """The processes of a peer."""

    crashed: int

    def tend(self) -> None:
        """Restarts what an operator's supervisor would restart. Raises BenchmarkError if the group cannot run on."""

    def kill(self, place: int) -> None: ...
    def close(self) -> None: ...


def kill_peer(kind: PeerKind, task: Task, kills: int, seed: int) -> PeerKills:
    """Kills random workers at random moments. Before each kill, waits until all workers have committed some steps together.

    Raises BenchmarkError if they do not within the time limit.
    """
    chance = random.Random(seed)
    shots: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory(prefix="elastic-bench-") as name:
        directory = Path(name)
        group = _start(kind, task, directory)
        try:
            _wait_until_steady(group, directory, task.workers, since=None)
            for _ in range(kills):
                time.sleep(chance.random() * (pace(first_of_each_step(read_commits(directory)), time.monotonic()) or 0.0))
                place = chance.randrange(task.workers)
                at = time.monotonic()
                group.kill(place)
                shots.append((at, place))
                _wait_until_steady(group, directory, task.workers, since=at)
            commits = read_commits(directory)
        except BenchmarkError as error:
            raise BenchmarkError(f"{error}\n{_log_ends(directory)}") from None
        finally:
            group.close()
    return PeerKills(kind=kind, task=task, kills=_measured(shots, first_of_each_step(commits), task), crashed=group.crashed)


def _measured(shots: Sequence[tuple[float, int]], commits: Sequence[StepCommit], task: Task) -> list[dict[str, Any]]:
    ends = [at for at, _ in shots[1:]] + [float("inf")]
    share = task.batch // task.workers
    found = []
    for (at, place), end in zip(shots, ends, strict=True):
        measured = stall(at, commits)
        if measured is None:
            raise BenchmarkError(f"the stall after the kill at place {place} cannot be measured: too few steps were committed")
        after = [commit for commit in commits if at < commit.at < end]
        full = next(commit for commit in after if _later(commit, at, commits) and commit.members == task.workers)
        members = {commit.step: commit.members for commit in after}
        last = max(commit.step for commit in commits if commit.at <= at)
        skipped = set(range(last + 1, max(members) + 1)).difference(members)
        found.append(
            {
                "place": place,
                "stall_ms": 1000 * measured.stall,
                "silence_ms": 1000 * measured.silence,
                "lost_ms": 1000 * measured.lost,
                "step_ms": 1000 * measured.step,
                "replaced_ms": 1000 * (full.at - at),
                "samples_lost": sum((task.workers - count) * share for count in members.values()) + len(skipped) * task.batch,
                "steps_skipped": len(skipped),
                "steps_without": sum(count < task.workers for count in members.values()),
            }
        )
    return found


def _later(commit: StepCommit, fault: float, commits: Sequence[StepCommit]) -> bool:
    """Returns whether the commit belongs to a view that began after the fault."""
    return commit.attempt_id > max((before.attempt_id for before in commits if before.at <= fault), default=-1)


def _wait_until_steady(group: PeerGroup, directory: Path, workers: int, since: float | None) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        group.tend()
        commits = first_of_each_step(read_commits(directory))
        recent = commits[-_STEADY:]
        together = (
            len(recent) == _STEADY and len({commit.attempt_id for commit in recent}) == 1 and all(c.members == workers for c in recent)
        )
        if together and (since is None or _later(recent[0], since, commits)):
            return
        time.sleep(_LOOK_S)
    raise BenchmarkError(f"the peer did not take {_STEADY} steps with all its workers within {_PATIENCE_S:.0f} s")


def _log_ends(directory: Path) -> str:
    return "\n".join(f"{path.name}: {path.read_text(errors='replace')[-1500:]}" for path in sorted(directory.glob("*.log")))


def _start(kind: PeerKind, task: Task, directory: Path) -> PeerGroup:
    return Torchrun(task, directory) if kind == "torchrun" else PeerReplicas(task, directory, *TIMEOUTS[kind])


@dataclass(slots=True)
class Torchrun:
    """A torchrun process, which restarts all its workers when one ends."""

    task: Task
    directory: Path
    crashed: int = 0
    _process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        settings = {"batch": self.task.batch, "steps": _ENDLESS, "directory": str(self.directory)}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.task.workers}"]
        command += ["--max-restarts=100", str(_HERE / "restarted.py"), json.dumps(settings)]
        # Without this setting, workers use the launcher's store for Gloo, which still holds the addresses of dead workers.
        environment = {**peer_environment(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        self._process = _spawn(command, environment, self.directory / "torchrun.log")

    def tend(self) -> None:
        if self._process.poll() is not None:
            raise BenchmarkError(f"torchrun ended with {self._process.returncode}")

    def kill(self, place: int) -> None:
        os.kill(int((self.directory / f"pid-{place}").read_text()), signal.SIGKILL)

    def close(self) -> None:
        reap([self._process])  # its workers die with it


@dataclass(slots=True)
class PeerReplicas:
    """TorchFT's lighthouse, and one process per replica group, which is restarted when it ends."""

    task: Task
    directory: Path
    heartbeat_s: float
    gloo_timeout_s: float
    crashed: int = 0
    _lighthouse: subprocess.Popen[bytes] = field(init=False)
    _environment: dict[str, str] = field(init=False)
    _replicas: dict[int, subprocess.Popen[bytes]] = field(init=False, default_factory=dict)
    _killed: set[int] = field(init=False, default_factory=set)  # pids

    def __post_init__(self) -> None:
        port = free_port()
        command = [str(Path(sys.executable).with_name("torchft_lighthouse")), "--min_replicas=1", f"--bind=[::]:{port}"]
        command.append(f"--heartbeat_timeout_ms={self.heartbeat_s * 1000:.0f}")
        self._environment = {**peer_environment(), "TORCHFT_LIGHTHOUSE": f"http://localhost:{port}"}
        self._lighthouse = _spawn(command, self._environment, self.directory / "lighthouse.log")
        for place in range(self.task.workers):
            self._fork(place)

    def _fork(self, place: int) -> None:
        settings = {"place": place, "places": self.task.workers, "batch": self.task.batch, "steps": _ENDLESS}
        settings |= {"directory": str(self.directory), "gloo_timeout_s": self.gloo_timeout_s}
        command = [sys.executable, str(_HERE / "replica.py"), json.dumps(settings)]
        self._replicas[place] = _spawn(command, self._environment, self.directory / f"replica-{place}.log")

    def tend(self) -> None:
        if self._lighthouse.poll() is not None:
            raise BenchmarkError(f"the lighthouse ended with {self._lighthouse.returncode}")
        for place, replica in list(self._replicas.items()):
            if replica.poll() is not None:
                self.crashed += replica.pid not in self._killed
                if self.crashed > 10 * self.task.workers:
                    raise BenchmarkError("replicas crash again and again")
                self._fork(place)

    def kill(self, place: int) -> None:
        self._killed.add(self._replicas[place].pid)
        self._replicas[place].send_signal(signal.SIGKILL)

    def close(self) -> None:
        reap([*self._replicas.values(), self._lighthouse])


def _spawn(command: Sequence[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a process that ends with this one, and appends its output to the log."""
    with log.open("ab") as output:
        return subprocess.Popen(tied_command(command), env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
