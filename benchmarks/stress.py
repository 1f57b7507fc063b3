"""Kills workers of one job many times, at random moments, and checks that results are unchanged and nothing grows.

    python benchmarks/stress.py --kills 100 --steps 10000 --json build/stress.json

Kills are spread over the steps; each waits until the last replacement has joined. One worker is never killed: it must not grow either.
At the end, digest and losses must equal those of an undisturbed run. Threads, descriptors, mapped segments and memory of every process, and
keys in etcd, are counted before each kill: the median of the last fifth of the counts may not exceed what the first fifth had at most.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from report import write_json
from rich.console import Console
from rich.table import Table

import elastic
from elastic.chaos.roster import Roster, RosterFile, Victim
from elastic.membership.server import PrivateEtcd, find_etcd
from elastic.observe.activity import STEP_PHASES, Doing
from elastic.observe.json_lines import append_lines

sys.path.append(str(Path(__file__).resolve().parents[1]))

from examples.gpt import StepLog, Text, build_gpt, cross_entropy, read_steps, read_text

WORKERS, STAGES, SEQ, BATCH, MICRO_BATCH = 4, 2, 32, 16, 4
DONE = "done"
RSS_GROWTH = 1.1  # allowed, relative to the most of the first counts
PART = 5  # the first and the last of so many parts of all counts are compared
app = typer.Typer(add_completion=False)


def train(job: elastic.Job, seed: int, steps: int | None) -> dict[str, Any] | None:
    """Trains for `steps`, or until the launcher writes `DONE`; returns the number of steps and the digest."""
    torch.manual_seed(seed)
    model = build_gpt(layers=4, dim=64, heads=4, seq=SEQ, dropout=0.1)
    trainer = elastic.Trainer(
        model,
        cross_entropy,
        torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
        Text(read_text(None), SEQ),
        batch_size=BATCH,
        micro_batch_size=MICRO_BATCH,
        clip_norm=1.0,
        seed=seed,
    )
    taken = 0
    with StepLog(Path(job.directory), job.worker) as log:
        for report in trainer.run(steps or 1 << 30):
            log.add(report)
            taken = report.step + 1
            if steps is None and Path(job.directory, DONE).exists():
                job.stop_requested = True
    digest = trainer.digest()
    return {"steps": taken, "digest": digest} if trainer.leader else None


def figures(pid: int) -> dict[str, int]:
    """Returns threads, descriptors, sockets, mapped segments and resident MiB of one process."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    links = [_target(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    return {
        "threads": int(fields["Threads"]),
        "descriptors": sum(not link.startswith("/proc/") for link in links),
        "proc_files": sum(link.startswith("/proc/") for link in links),  # the agent keeps a few open for each thread of its workers
        "sockets": sum(link.startswith("socket:") for link in links),
        "segments": Path(f"/proc/{pid}/maps").read_text().count("memfd:elastic"),
        "rss_mib": int(fields["VmRSS"].split()[0]) >> 10,
    }


def _target(link: Path) -> str:
    with suppress(FileNotFoundError):  # closed since it was listed
        return os.readlink(link)
    return ""


def keys(endpoint: str, job: str) -> int:
    """Returns the number of the job's keys in etcd."""
    command = [str(Path(find_etcd()).with_name("etcdctl")), "--endpoints", endpoint, "get", f"/elastic/{job}/", "--prefix", "--keys-only"]
    return len(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def measure(directory: Path, endpoint: str, job: str) -> dict[str, Any]:
    """Returns the figures of all processes of a job, and the number of its keys."""
    members = json.loads((directory / "members.json").read_text())
    found = {str(member["worker"]): figures(member["pid"]) for member in members["members"]}
    agent, forkserver = figures(members["agent"]), figures(members["forkserver"])
    return {"workers": found, "agent": agent, "forkserver": forkserver, "etcd": {"keys": keys(endpoint, job)}}


class Stress(threading.Thread):
    """Kills random members (never the oldest) at random moments, `kills` times in `steps`, when all are members; then lets the job end."""

    def __init__(self, directory: Path, endpoint: str, job: str, kills: int, steps: int, seed: int) -> None:
        super().__init__(name="stress", daemon=True)
        self.killed: list[dict[str, Any]] = []
        self.counts: list[dict[str, Any]] = []
        self._directory, self._endpoint, self._job, self._kills, self._steps = directory, endpoint, job, kills, steps
        self._random = random.Random(seed)
        self._rosters = RosterFile(directory / "members.json")
        self._waiting = threading.Event()

    def run(self) -> None:
        epoch = self._whole(0)
        self._kill(WORKERS - 1)  # not counted: some threads of gRPC start with the first change of members
        self.killed.clear()
        epoch = self._whole(epoch + 1)
        for kill in range(self._kills):
            self._reach(self._steps * (kill + 1) // (self._kills + 1))
            self._wait(self._random.uniform(0.0, 0.5))
            self.counts.append(measure(self._directory, self._endpoint, self._job))
            self._kill(self._random.randrange(1, WORKERS))
            epoch = self._whole(epoch + 1)
        self._reach(self._steps)
        self.counts.append(measure(self._directory, self._endpoint, self._job))
        (self._directory / DONE).touch()

    def _reach(self, step: int) -> None:
        """Waits until the worker that is never killed has reached a step."""
        while True:
            roster = self._rosters.read()
            doing = self._looked(roster, *min(roster.members)) if roster is not None and roster.members else None
            if doing is not None and doing.step >= step:
                return
            self._wait(0.05)

    def _looked(self, roster: Roster, worker: int, pid: int) -> Doing | None:
        target = Victim(self._directory, worker, pid, roster.forkserver)
        try:
            return target.look()
        finally:
            target.close()

    def _wait(self, seconds: float) -> None:
        self._waiting.wait(seconds)

    def _whole(self, epoch: int) -> int:
        """Waits until all workers train in a view of `epoch` or later; returns its epoch."""
        while True:
            roster = self._rosters.read()
            if roster is not None and roster.epoch >= epoch and len(roster.members) == WORKERS and self._training(roster):
                return roster.epoch
            self._wait(0.01)

    def _training(self, roster: Roster) -> bool:
        for worker, pid in roster.members:
            doing = self._looked(roster, worker, pid)
            if doing is None or doing.epoch != roster.epoch or doing.phase not in STEP_PHASES:
                return False
        return True

    def _kill(self, place: int) -> None:
        roster = self._rosters.read()
        assert roster is not None  # the last wait ended with one
        worker, pid = sorted(roster.members)[place]
        target = Victim(self._directory, worker, pid, roster.forkserver)
        doing = target.look()
        fault = {"worker": worker, "pid": pid, "place": place, "kind": "kill", "at": time.monotonic()}
        fault |= {"step": None if doing is None else doing.step, "phase": None if doing is None else doing.phase}
        append_lines(self._directory / "faults.jsonl", [fault])
        target.kill()
        target.ended(5.0)
        target.close()
        self.killed.append(fault)


def series(counts: list[dict[str, Any]]) -> dict[tuple[str, str], list[int]]:
    """Returns each figure of each process at each count: of the worker that is never killed, and the most of the others."""
    found: dict[tuple[str, str], list[int]] = {}
    for count in counts:
        oldest, *others = (count["workers"][worker] for worker in sorted(count["workers"], key=int))
        for what in oldest:
            found.setdefault(("survivor", what), []).append(oldest[what])
            found.setdefault(("other workers", what), []).append(max(other[what] for other in others))
        for name in ("agent", "forkserver", "etcd"):
            for what, value in count[name].items():
                found.setdefault((name, what), []).append(value)
    return found


def compare(counts: list[dict[str, Any]], table: Table) -> list[str]:
    """Fills a table with the figures at first and at last; returns those that have grown."""
    wrong, part = [], max(1, len(counts) // PART)
    for (name, what), values in series(counts).items():
        most, typical, last = max(values[:part]), statistics.median(values[:part]), statistics.median(values[-part:])
        table.add_row(name, what, f"{typical:g} ({most})", f"{last:g} ({max(values[-part:])})")
        if last > (most * RSS_GROWTH if what == "rss_mib" else most):
            wrong.append(f"{name}: {what} was {typical:g} ({most} at most) and is {last:g}")
    return wrong


@app.command()
def main(
    kills: Annotated[int, typer.Option(help="Workers to kill.")] = 50,
    steps: Annotated[int, typer.Option(help="Steps to take, at least.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the model, and of the kills.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write figures to this file.")] = None,
) -> None:
    """Kills workers of one job at random moments. Exits with 1 if results or resources differ from before."""
    console = Console()
    with tempfile.TemporaryDirectory(prefix="elastic-stress-") as folder:
        etcd = PrivateEtcd(Path(folder))
        try:
            endpoint, directory = str(etcd.endpoint()), Path(folder, "run")
            directory.mkdir()
            stress = Stress(directory, endpoint, "stress", kills, steps, seed)
            stress.start()
            killed = elastic.run(
                train, workers=WORKERS, stages=STAGES, name="stress", etcd=endpoint, directory=directory, args=(seed, None)
            )
            losses = [step["loss"] for step in read_steps(directory)]
            calm_directory = Path(folder, "calm")
            calm_directory.mkdir()
            calm = elastic.run(train, workers=WORKERS, stages=STAGES, directory=calm_directory, args=(seed, killed.value["steps"]))
            calm_losses = [step["loss"] for step in read_steps(calm_directory)]
        finally:
            etcd.stop()
    deaths = [incident for incident in killed.incidents if incident["kind"] == "death"]
    table = Table("", "", "median (most) at first", f"after {kills} kills")
    wrong = compare(stress.counts, table)
    if killed.value["digest"] != calm.value["digest"] or losses != calm_losses:
        wrong.append("digest or losses differ from the undisturbed run")
    if len(stress.killed) != kills or len(deaths) != kills + 1:
        wrong.append(f"{len(stress.killed)} workers were killed and {len(deaths) - 1} deaths recorded, of {kills}")
    if lost := sum(incident["samples_lost"] or 0 for incident in killed.incidents):
        wrong.append(f"{lost} samples were lost")
    wrong += [
        f"epoch {incident['epoch']}: {incident['bytes_moved']} bytes moved, {incident['bytes_minimum']} needed"
        for incident in killed.incidents
        if incident["bytes_moved"] != incident["bytes_minimum"]
    ]
    console.print(table)
    running = [incident["running_ms"] for incident in deaths if incident["running_ms"] is not None]
    phases = {phase: sum(fault["phase"] == phase for fault in stress.killed) for phase in sorted({str(f["phase"]) for f in stress.killed})}
    taken = killed.value["steps"]
    console.print(
        f"{taken} steps, {len(killed.incidents)} incidents, running again after {statistics.median(running):.0f} ms; hit in {phases}"
    )
    console.print(f"digests {killed.value['digest']} and, undisturbed, {calm.value['digest']}")
    write_json(json_file, {"counts": stress.counts, "wrong": wrong, "steps": taken, "incidents": killed.incidents})
    for failure in wrong:
        console.print(f"[red]{failure}")
    console.print("nothing leaked, and all results are equal" if not wrong else f"{len(wrong)} checks failed")
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    app()
