"""Measures how fast failures are noticed that do not announce themselves, and how long the job stalls.

    python benchmarks/detection.py --json build/detection.json                        # workers of one host
    python benchmarks/detection.py --hosts --json build/detection_hosts.json          # hosts, in network namespaces: needs root
    python benchmarks/detection.py --false 1800 --json build/false_exclusions.json    # who is excluded without a fault: nobody must be

Workers: a job of the example's GPT has one fault at worker 1, in the middle of the training. `noticed` is the time from the fault until
the agent acts on it. Each job must lose that worker and no other, name the cause, and end with the digest of an undisturbed job. Hosts: see
`detection_hosts.py`.
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
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import detection_hosts
import detection_train
import typer
from report import write_json
from rich.console import Console
from rich.table import Table

import elastic
from elastic.engine.stage import LayerRunner

sys.path.append(str(Path(__file__).resolve().parents[1]))

from examples import gpt
from examples.gpt import Text

OPTIONS = {
    "layers": 6,
    "dim": 128,
    "heads": 4,
    "seq": 64,
    "batch": 24,
    "micro_batch": 2,
    "dropout": 0.1,
    "clip": 1.0,
}
WORKERS, VICTIM, BUSY = 3, 1, 8
PAUSED_S, STORAGE_S, STORAGE_STEPS = 10.0, 60.0, 24
HOST_FAULTS = detection_hosts.HOST_FAULTS
RECOVERING = "silent in a recovery"
app = typer.Typer(add_completion=False)


def _sleep() -> None:
    time.sleep(3600)


def _spin() -> None:
    while True:
        pass


FAULTS: dict[str, tuple[str, Callable[[], None], str | None]] = {
    "killed": ("forward", lambda: os.kill(os.getpid(), signal.SIGKILL), None),
    "stopped": ("forward", lambda: os.kill(os.getpid(), signal.SIGSTOP), "stopped"),
    "hung in a layer": ("forward", _sleep, "hung"),
    "hung in a data loader": ("load", _sleep, "hung in its data loader"),
    "endless loop": ("forward", _spin, "spinning"),
    RECOVERING: ("quiesce", _sleep, "silent in a recovery"),
}
"""By kind: where it happens, what happens, and the cause that must be named."""


def train(job: elastic.Job, options: dict[str, Any], kind: str, at: int, folder: str) -> dict[str, Any] | None:
    """Trains the example's GPT, with a fault of this kind at worker VICTIM in step `at`."""
    where, fault, _ = FAULTS.get(kind, ("", _sleep, None))
    happened = Path(folder, "happened")

    def happens() -> None:
        if job.worker == VICTIM and not happened.exists():
            happened.write_text(str(time.monotonic()))
            fault()

    if where == "forward":
        run = LayerRunner.forward

        def forward(self: LayerRunner, step: int, *rest: Any) -> Any:
            if step == at:
                happens()
            return run(self, step, *rest)

        LayerRunner.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
    elif where == "load":
        take = Text.__getitem__
        Text.__getitem__ = lambda self, index: (happens() if job.step == at else None, take(self, index))[1]
    elif where:
        enter = job.enter

        def entered(phase: str, step: int, micro_batch: int = -1) -> None:
            enter(phase, step, micro_batch)
            if phase == where:
                happens()
            elif job.worker == 2 and (phase, step) == ("forward", at):
                os.kill(os.getpid(), signal.SIGKILL)  # this begins the recovery

        job.enter = entered
    return gpt.train(job, options)


def once(kind: str, steps: int) -> dict[str, Any]:
    """Runs one job, and returns its figures."""
    with tempfile.TemporaryDirectory(prefix="elastic-bench-") as folder:
        arguments = [{**OPTIONS, "steps": steps}, kind, steps // 2, folder]
        result = elastic.run(train, workers=WORKERS, args=arguments, directory=Path(folder, "run"), rebalance=False)
        happened = Path(folder, "happened")
        fault = float(happened.read_text()) if happened.exists() else None
    rates = result.value["tokens_per_second"]
    lost = [each for each in result.incidents if each["kind"] in ("death", "eviction")]
    found = {"digest": result.value["digest"], "step_s": OPTIONS["batch"] * OPTIONS["seq"] / statistics.median(rates)}
    if fault is None:
        return {**found, "incidents": lost}
    first = lost[0]
    noticed = first["at"] + (first["detected_ms"] + (first["phases_ms"]["quiesce"] if kind == RECOVERING else 0.0)) / 1000
    return {**found, "incidents": lost, "noticed_s": noticed - fault, "stall_s": first["stall_ms"] / 1000}


def measured(kind: str, steps: int, repeats: int, calm: dict[str, Any]) -> dict[str, Any]:
    """Runs jobs with this fault, checks them, and returns the medians."""
    cause, runs = FAULTS[kind][2], []
    for _ in range(repeats):
        run = once(kind, steps)
        lost = {each for incident in run["incidents"] for each in (incident["worker"], *incident["also"])}
        if lost != {VICTIM} | ({2} if kind == RECOVERING else set()):
            raise SystemExit(f"{kind}: workers {sorted(lost)} were lost")
        if kind != RECOVERING and run["incidents"][0]["cause"] != cause:
            raise SystemExit(f"{kind}: the incident names {run['incidents'][0]['cause']}")
        if run["digest"] != calm["digest"]:
            raise SystemExit(f"{kind}: the digest differs from that of the undisturbed run")
        runs.append(run)
    medians = {name: statistics.median(run[name] for run in runs) for name in ("noticed_s", "stall_s", "step_s")}
    why = runs[0]["incidents"][0]["why"]
    worst = max(run["noticed_s"] for run in runs)
    return {"kind": kind, **medians, "noticed_most_s": worst, "steps": medians["noticed_s"] / calm["step_s"], "why": why, "runs": runs}


@app.command()
def main(
    repeats: Annotated[int, typer.Option(help="Jobs of each kind.")] = 20,
    steps: Annotated[int, typer.Option(help="Steps of each job.")] = 24,
    hosts: Annotated[bool, typer.Option("--hosts", help="Faults of hosts instead of workers.")] = False,
    kind: Annotated[list[str] | None, typer.Option(help=f"One of: {', '.join([*FAULTS, *HOST_FAULTS])}. All by default.")] = None,
    crowded: Annotated[float, typer.Option("--false", help="Instead: count false exclusions, for so many seconds.")] = 0.0,
    path: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """Prints a table, and one JSON object per kind."""
    if crowded:
        found: Any = count_false_exclusions(crowded, steps)
        print(json.dumps(found))
        write_json(path, found)
        return
    if hosts or any(each in HOST_FAULTS for each in kind or ()):
        write_json(path, measure_hosts(kind or [*HOST_FAULTS], repeats))
        return
    calm = once("", steps)
    table = Table(title=f"one of {WORKERS} workers fails; medians of {repeats}; a step takes {calm['step_s']:.2f} s")
    for heading in ("kind", "noticed", "at most", "in steps", "stall"):
        table.add_column(heading)
    found = []
    for each in kind or FAULTS:
        found.append(measured(each, steps, repeats, calm))
        last = found[-1]
        table.add_row(
            each, f"{last['noticed_s']:.2f} s", f"{last['noticed_most_s']:.2f} s", f"{last['steps']:.1f}", f"{last['stall_s']:.2f} s"
        )
        print(json.dumps({name: value for name, value in last.items() if name != "runs"}), flush=True)
    Console(stderr=True).print(table)
    write_json(path, found)


def measure_hosts(kinds: list[str], repeats: int) -> list[dict[str, Any]]:
    """Measures faults of hosts, in `repeats` jobs that have all of them; prints a table, and one JSON object per kind."""
    lives = [detection_hosts.life(kinds) for _ in range(repeats)]
    digests = elastic.run(detection_train.digests, workers=1, args=[sorted({each["step"] for each in lives})]).value
    if any(each["digest"] != digests[str(each["step"])] for each in lives):
        raise SystemExit("a digest differs from that of the undisturbed run")
    seconds = statistics.median(each["seconds"] for each in lives)
    table = Table(title=f"one of {detection_hosts.HOSTS} hosts fails; medians of {repeats} jobs with all faults, {seconds:.0f} s each")
    for heading in ("kind", "noticed", "at most", "running again", "gap between steps", "steps redone"):
        table.add_column(heading)
    found = []
    for kind in kinds:
        found.append(last := detection_hosts.summary(kind, lives))
        times = (f"{last[name]:.2f} s" for name in ("noticed_s", "noticed_s_most", "running_s", "gap_s"))
        table.add_row(kind, *times, f"{last['steps_redone']:g}")
        print(json.dumps({name: value for name, value in last.items() if name != "runs"}), flush=True)
    Console(stderr=True).print(table)
    return found


def count_false_exclusions(seconds: float, steps: int) -> dict[str, Any]:
    """Counts the workers that are excluded without a fault: next to BUSY processes that never rest, when all workers are stopped for
    PAUSED_S, and when a save takes STORAGE_S."""
    crowded, slow = next_to_others(seconds, steps), at_slow_storage()
    try:
        paused: dict[str, Any] | None = detection_hosts.paused(PAUSED_S)
    except (OSError, subprocess.CalledProcessError):  # network namespaces are not permitted
        paused = None
    return {"crowded": crowded, "slow storage": slow, "paused": paused}


def at_slow_storage() -> dict[str, Any]:
    """Runs a job whose saves take long."""
    with tempfile.TemporaryDirectory(prefix="elastic-bench-") as folder:
        began = time.monotonic()
        result = elastic.run(detection_train.train, workers=WORKERS, args=[STORAGE_STEPS, 0.01, str(Path(folder, "saved")), STORAGE_S])
    return {"storage_s": STORAGE_S, "seconds": time.monotonic() - began, "saved": result.saves.saved, "excluded": _lost(result)}


def _lost(result: elastic.JobResult) -> list[dict[str, Any]]:
    return [each for each in result.incidents if each["kind"] in ("death", "eviction")]


def next_to_others(seconds: float, steps: int) -> dict[str, Any]:
    """Runs undisturbed jobs next to BUSY processes that never rest."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(BUSY)]
    began, jobs, excluded = time.monotonic(), 0, []
    try:
        while time.monotonic() - began < seconds:
            excluded += once("", steps)["incidents"]
            jobs += 1
    finally:
        for process in busy:
            process.kill()
            process.wait()
    return {"seconds": time.monotonic() - began, "busy_processes": BUSY, "jobs": jobs, "excluded": excluded}


if __name__ == "__main__":
    app()
