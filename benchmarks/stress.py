"""Kills workers of one job many times, at random moments, and checks that results are unchanged and no resources leak.

    python benchmarks/stress.py --kills 50 --json build/stress.json

Each kill waits until the last replacement has joined. At the end, digest and losses must equal those of an undisturbed run. Threads, open
descriptors, memory and links of every process, and the keys in etcd, must be as before the first kill.
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
from elastic.observe.activity import STEP_PHASES
from elastic.observe.json_lines import append_lines

sys.path.append(str(Path(__file__).resolve().parents[1]))

from examples.gpt import StepLog, Text, build_gpt, cross_entropy, read_steps, read_text

WORKERS, STAGES, SEQ, BATCH, MICRO_BATCH = 4, 2, 32, 16, 4
DONE = "done"
RSS_GROWTH = 1.25  # allowed, relative to the largest worker at the start
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
    """Returns threads, descriptors, sockets and resident MiB of one process."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    sockets = sum(1 for link in Path(f"/proc/{pid}/fd").iterdir() if os.readlink(link).startswith("socket:"))
    count = len(os.listdir(f"/proc/{pid}/fd"))
    return {"threads": int(fields["Threads"]), "descriptors": count, "sockets": sockets, "rss_mib": int(fields["VmRSS"].split()[0]) >> 10}


def keys(endpoint: str, job: str) -> int:
    """Returns the number of the job's keys in etcd."""
    command = [str(Path(find_etcd()).with_name("etcdctl")), "--endpoints", endpoint, "get", f"/elastic/{job}/", "--prefix", "--keys-only"]
    return len(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def measure(directory: Path, endpoint: str, job: str) -> dict[str, Any]:
    """Returns the figures of all processes of a job, and the number of its keys."""
    members = json.loads((directory / "members.json").read_text())
    found = {str(member["worker"]): figures(member["pid"]) for member in members["members"]}
    return {"workers": found, "agent": figures(members["agent"]), "forkserver": figures(members["forkserver"]), "keys": keys(endpoint, job)}


class Stress(threading.Thread):
    """Kills random members at random moments, `kills` times, each after all workers are members again; then lets the job end."""

    def __init__(self, directory: Path, endpoint: str, job: str, kills: int, seed: int) -> None:
        super().__init__(name="stress", daemon=True)
        self.killed: list[dict[str, Any]] = []
        self.before: dict[str, Any] = {}
        self.after: dict[str, Any] = {}
        self._directory, self._endpoint, self._job, self._kills = directory, endpoint, job, kills
        self._random = random.Random(seed)
        self._rosters = RosterFile(directory / "members.json")
        self._waiting = threading.Event()

    def run(self) -> None:
        epoch = self._whole(0)
        self._kill(WORKERS - 1)  # not counted: some threads of gRPC start with the first change of members
        self.killed.clear()
        epoch = self._whole(epoch + 1)
        self._wait(4.0)
        self.before = measure(self._directory, self._endpoint, self._job)
        for _ in range(self._kills):
            self._wait(self._random.uniform(0.0, 0.5))
            self._kill(self._random.randrange(WORKERS))
            epoch = self._whole(epoch + 1)
        self._wait(4.0)  # until leases of dead workers expire, with their keys
        self.after = measure(self._directory, self._endpoint, self._job)
        (self._directory / DONE).touch()

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
            target = Victim(self._directory, worker, pid, roster.forkserver)
            try:
                doing = target.look()
            finally:
                target.close()
            if doing is None or doing.epoch != roster.epoch or doing.phase not in STEP_PHASES:
                return False
        return True

    def _kill(self, place: int) -> None:
        roster = self._rosters.read()
        assert roster is not None  # the last wait ended with one
        worker, pid = roster.members[place]
        target = Victim(self._directory, worker, pid, roster.forkserver)
        doing = target.look()
        fault = {"worker": worker, "pid": pid, "place": place, "kind": "kill", "at": time.monotonic()}
        fault |= {"step": None if doing is None else doing.step, "phase": None if doing is None else doing.phase}
        append_lines(self._directory / "faults.jsonl", [fault])
        target.kill()
        target.ended(5.0)
        target.close()
        self.killed.append(fault)


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Returns the figures that are worse than before."""
    wrong = [] if after["keys"] == before["keys"] else [f"etcd keys: {before['keys']} and then {after['keys']}"]
    for name in ("agent", "forkserver", "workers"):
        at_first = list(before["workers"].values()) if name == "workers" else [before[name]]
        at_last = list(after["workers"].values()) if name == "workers" else [after[name]]
        for what in at_first[0]:
            most, now = max(entry[what] for entry in at_first), max(entry[what] for entry in at_last)
            if now > (most * RSS_GROWTH if what == "rss_mib" else most):
                wrong.append(f"{name}: {what} was {most} and is {now}")
    return wrong


@app.command()
def main(
    kills: Annotated[int, typer.Option(help="Workers to kill.")] = 50,
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
            stress = Stress(directory, endpoint, "stress", kills, seed)
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
    wrong = compare(stress.before, stress.after)
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
    table = Table("", "before the first kill", f"after {kills} kills")
    for name in ("agent", "forkserver"):
        table.add_row(name, str(stress.before[name]), str(stress.after[name]))
    for (one, first), (other, last) in zip(stress.before["workers"].items(), stress.after["workers"].items(), strict=True):
        table.add_row(f"worker {one}, then {other}", str(first), str(last))
    table.add_row("keys in etcd", str(stress.before["keys"]), str(stress.after["keys"]))
    console.print(table)
    running = [incident["running_ms"] for incident in deaths if incident["running_ms"] is not None]
    phases = {phase: sum(fault["phase"] == phase for fault in stress.killed) for phase in sorted({str(f["phase"]) for f in stress.killed})}
    steps = killed.value["steps"]
    console.print(
        f"{steps} steps, {len(killed.incidents)} incidents, running again after {statistics.median(running):.0f} ms; hit in {phases}"
    )
    console.print(f"digests {killed.value['digest']} and, undisturbed, {calm.value['digest']}")
    write_json(json_file, {"before": stress.before, "after": stress.after, "wrong": wrong, "steps": steps, "incidents": killed.incidents})
    for failure in wrong:
        console.print(f"[red]{failure}")
    console.print("nothing leaked, and all results are equal" if not wrong else f"{len(wrong)} checks failed")
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    app()
