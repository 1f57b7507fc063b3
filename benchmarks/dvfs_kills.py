"""Kills a worker, the agent, the guardian, or all processes of real jobs at random moments, and measures when the clocks are restored.

    python benchmarks/dvfs_kills.py --kills 50 --seed 1

Each job trains on stand-in GPUs with `dvfs="energy"` in a process of its own, and is hit within 12 seconds of its first lock: while its
clocks are measured, set, held or changed. The seconds run from

    worker     the kill: the guardian lives; the clock of the dead worker's GPU is restored, and all clocks are when the job has ended
    agent      the kill: the guardian lives
    guardian   its kill: the agent restores, and then starts a successor
    all        the start of the next job's guardian, process start included; all are the launcher, agent, fork server, workers and guardian

A clock counts as restored when the driver was asked to remove its lock after the kill, since a successor sets it again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from elastic.power.clocks import Clocks  # noqa: E402
from examples.nvml_standin import GpuKind, StandIn, build  # noqa: E402

KINDS = ("worker", "agent", "guardian", "all")
SPAN_S, LIMIT_S = 12.0, 10.0

_JOB = """
import json, sys
sys.path[:0] = sys.argv[2:4]
import elastic
from dvfs_training import train
options = json.loads(sys.argv[1])
elastic.run(train, workers=2, stages=2, args=[options], dvfs="energy", directory=options["run"], rebalance=False)
"""


class Subject:
    """A real job on four stand-in GPUs, in a process of its own."""

    def __init__(self, base: Path, library: Path) -> None:
        (base / "claims").mkdir(parents=True)
        self.base, self.standin = base, StandIn.made(base / "gpus", [GpuKind()] * 4)
        self.clocks = base / "clocks"
        options = {"uuids": self.standin.uuids, "directory": str(base / "claims"), "run": str(base / "run"), "layers": 5, "width": 8}
        options |= {"seconds": 0.002, "beta": 1.0, "steps": 90, "micro_batches": 8}
        self._environment = {"ELASTIC_CLOCKS": str(self.clocks), "ELASTIC_POWER_SOCKET": str(base / "no-daemon")}
        self._environment |= self.standin.environment(library)
        words = [sys.executable, "-c", _JOB, json.dumps(options), str(ROOT), str(ROOT / "examples")]
        with (base / "log").open("wb") as log:
            self.launcher = psutil.Popen(words, env={**os.environ, **self._environment}, stdout=log, stderr=log)

    def members(self) -> dict[str, Any]:
        return json.loads((self.base / "run" / "members.json").read_text())

    def guardians(self) -> list[int]:
        """Returns the guardians of this job's agent."""
        found = []
        for process in self.processes():
            with suppress(psutil.Error):
                if any("elastic.power.guardian" in word for word in process.cmdline()):
                    found.append(process.pid)
        return found

    def asked(self) -> list[int]:
        """Returns how often each GPU's driver was asked to remove a lock."""
        return [gpu.resets for gpu in self.standin.gpus]

    def gpu_of(self, pid: int) -> int:
        """Returns the GPU that a worker has claimed."""
        names = [Path(each.path).name for each in psutil.Process(pid).open_files()]
        return next(number for number, uuid in enumerate(self.standin.uuids) if f"{uuid}.worker" in names)

    def processes(self) -> list[psutil.Process]:
        """Returns all processes of the job that live, the launcher last."""
        with suppress(psutil.Error):
            return [*self.launcher.children(recursive=True), self.launcher]
        return []

    def end(self) -> None:
        """Ends what is left of the job."""
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()
        self.launcher.wait()


def waited(until: Callable[[], object], seconds: float) -> bool:
    """Waits for something that other processes do."""
    deadline = time.monotonic() + seconds
    while not until():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return True


def hit(kind: str, subject: Subject, chance: random.Random) -> float:
    """Kills, and returns the seconds until the clocks were restored; infinite if they were not."""
    locked = [number for number, mhz in enumerate(subject.standin.locked) if mhz]
    asked, began = subject.asked(), time.monotonic()

    def restored() -> bool:
        return all(subject.asked()[number] > asked[number] or not subject.standin.locked[number] for number in locked)

    if kind == "worker":
        pid = chance.choice(subject.members()["members"])["pid"]
        locked = [subject.gpu_of(pid)]
        os.kill(pid, signal.SIGKILL)
    elif kind == "agent":
        os.kill(subject.members()["agent"], signal.SIGKILL)
    elif kind == "guardian":
        for pid in subject.guardians():
            os.kill(pid, signal.SIGKILL)
    else:
        everybody = subject.processes()
        for process in everybody:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGSTOP)  # so that none reacts to the death of another
        for process in everybody:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(everybody)
        with ThreadPoolExecutor(1) as pool:
            began = time.monotonic()
            successor = pool.submit(Clocks, "successor", subject.clocks, subject.base / "no-daemon")
            found = time.monotonic() - began if waited(restored, LIMIT_S) else float("inf")
            assert successor.result().close() == []
        return found
    return time.monotonic() - began if waited(restored, LIMIT_S) else float("inf")


def trial(kind: str, base: Path, library: Path, chance: random.Random) -> dict[str, Any]:
    """Runs one job, kills, and waits until nothing of it is left. Returns what was seen."""
    subject = Subject(base, library)
    os.environ.update(subject._environment)
    try:
        if not waited(lambda: any(subject.standin.locked), 180):
            raise RuntimeError(f"no clock was locked: {(base / 'log').read_text()[-2000:]}")
        after_s, told = chance.random() * SPAN_S, dict[str, Any]()
        waited(lambda: not subject.launcher.is_running() or subject.launcher.status() == psutil.STATUS_ZOMBIE, after_s)
        with suppress(OSError, ValueError):
            told = json.loads((base / "run" / "energy.json").read_text())
        locked = list(subject.standin.locked)
        seconds = hit(kind, subject, chance)
        done = subject.launcher.wait(120)
        left = list(subject.standin.locked)
        waited(lambda: not any(subject.standin.locked), 1.0)
        return {
            "kind": kind,
            "after_s": round(after_s, 3),
            "state": told.get("state"),
            "locked": locked,
            "seconds": seconds,
            "exit": done,
            "locked_at_the_end": left,
            "restored": seconds < 1.0 and not any(subject.standin.locked),
        }
    finally:
        subject.end()


def killed(count: int, seed: int, base: Path) -> dict[str, Any]:
    """Runs the trials, the kinds in turns. Returns how many were restored, and the longest time by kind."""
    base.mkdir(exist_ok=True)
    library = build(base)
    found: list[dict[str, Any]] = []
    for number in range(count):
        found.append(trial(KINDS[number % len(KINDS)], base / str(number), library, random.Random(seed * 1000 + number)))
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    most = {kind: max((each["seconds"] for each in found if each["kind"] == kind), default=0.0) for kind in KINDS}
    return {"kills": count, "seed": seed, "restored": sum(each["restored"] for each in found), "most_s": most, "trials": found}


def main() -> None:
    """Prints JSON."""
    parser = argparse.ArgumentParser(description="SIGKILLs at random moments of jobs that set clocks.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="elastic-dvfs-kills-") as name:
        base = Path(name)
        if "NVML_STANDIN" not in os.environ:  # the loader reads its path when a process starts
            library = build(base)
            made = StandIn.made(base / "none", [GpuKind()])
            done = subprocess.run([sys.executable, *sys.argv], env={**os.environ, **made.environment(library)}, check=False)
            sys.exit(done.returncode)
        print(json.dumps(killed(arguments.kills, arguments.seed, base), indent=1))


if __name__ == "__main__":
    main()
