"""Kills workers in every phase of a step and of a recovery, and shows whether each job came out bit for bit as if undisturbed.

    python examples/kill_table.py
    python examples/kill_table.py --only apply --json table.json

Every line is a real job: a small GPT on four workers in three stages. Where a phase is too short to be hit, workers linger in it.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import select
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from gpt import StepLog, Text, build_gpt, cross_entropy, read_steps
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import elastic
from elastic.chaos.faults import Fault
from elastic.chaos.killer import Killer
from elastic.layout.replicas import replica_holders
from elastic.observe import linger
from elastic.observe.activity import RECOVERY_PHASES, STEP_PHASES, Doing, Watch
from elastic.observe.incident import append_lines, read_lines

T = TypeVar("T")

WORKERS, STAGES = 4, 3
STEP, STEPS = 8, 14
LONG_STEPS, LONG_PAUSE_S = 60, 0.06
"""Of jobs that go on until a new worker has joined: they take their time until then."""

SAVED_EVERY = 2
LINGER_S = 0.04
END_S = 10.0
"""How long after the last fault a job that cannot go on may take to end."""

GONE_S = 3.0
_SHORT = ("reduce", "ready", "apply", "gather", "replicate", *RECOVERY_PHASES)


def train(job: elastic.Job, steps: int, pause_s: float, saved: str | None) -> dict[str, Any] | None:
    """Runs on every worker: a GPT with dropout, tied embeddings, clipping and a scheduler. `saved`: where it saves, if it does."""
    torch.manual_seed(0)
    model = build_gpt(3, 64, 4, 64, dropout=0.1, tied=True)
    trainer = elastic.Trainer(
        model,
        cross_entropy,
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        Text(bytes(i * i % 251 for i in range(1 << 14)), 64),
        batch_size=16,
        micro_batch_size=2,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps),
        clip_norm=0.5,
        checkpoint=saved,
        every=SAVED_EVERY if saved else None,
    )
    with StepLog(Path(job.directory), job.worker) as log:
        for report in trainer.run(steps):
            log.add(report)
            if job.view is not None and max(job.view.workers) < job.workers:
                time.sleep(pause_s)
            if saved and report.step < STEP:
                time.sleep(LONG_PAUSE_S)  # a disk needs some time
    digest = trainer.digest()
    if not trainer.leader:
        return None
    return {"digest": digest, "losses": [step["loss"] for step in read_steps(Path(job.directory))]}


# What is done to a job


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """One process that was killed: in which phase it was to be ("" if in any), and in which it was; None if it did not die."""

    at: float
    asked: str
    observed: str | None

    def __str__(self) -> str:
        return (self.observed or "still alive") + (f" (not {self.asked})" if self.missed else "")

    @property
    def missed(self) -> bool:
        """Whether another phase was hit."""
        return self.asked not in ("", self.observed)


class Over(Exception):
    """The job has ended."""


class Scene:
    """A running job, seen from outside: what a plan acts on. `faulted` is when it did so last."""

    def __init__(self, directory: Path, plan: Callable[[Scene], None]) -> None:
        self.directory = directory
        self.faulted: float | None = None
        self.missed: list[str] = []
        self.hits: list[Hit] = []
        self._killer: Killer | None = None
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._act, args=(plan,), daemon=True)
        self._thread.start()

    def _act(self, plan: Callable[[Scene], None]) -> None:
        try:
            plan(self)
        except Over:
            self.missed.append("the job was over before its turn")
        except BaseException as error:
            self._error = error

    def close(self) -> list[Hit]:
        """To be called when the job is over."""
        self._over.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        if self._killer is not None:
            self.missed += map(str, self._killer.close())
            for shot in self._killer.shots:
                self.faulted = max(self.faulted or 0.0, shot.at)
                here = shot.observed is not None and (shot.fault.in_recovery or shot.observed.step == shot.fault.step)
                observed = None if shot.observed is None else shot.observed.phase if here else f"{shot.observed.phase} {shot.observed.step}"
                # Several die at once when the first is where it is to be.
                asked = shot.fault.phase or "" if shot.place == shot.fault.places[0] else ""
                self.hits.append(Hit(at=shot.at, asked=asked, observed=observed))
        self.hits.sort(key=lambda hit: hit.at)
        return self.hits

    def members(self, epoch: int = 1) -> dict[str, Any]:
        """members.json, as soon as it is of this epoch or a later one."""

        def read() -> dict[str, Any] | None:
            with suppress(FileNotFoundError):
                record = json.loads((self.directory / "members.json").read_text())
                return record if record["epoch"] >= epoch else None
            return None

        return self.until(read)

    def until(self, condition: Callable[[], T | None]) -> T:
        """What `condition` gives, once it gives something. Raises Over."""
        while not self._over.is_set():
            if found := condition():
                return found
            self._over.wait(0.0003)
        raise Over

    def seen(self, worker: int, phase: str | None, epoch: int, step: int = -1) -> Doing:
        """What the worker does, once it is in this phase of this epoch, at this step or a later one."""
        watch = self.until(lambda: self._watch(worker))

        def look() -> Doing | None:
            doing = watch.read()
            there = doing is not None and phase in (None, doing.phase) and doing.epoch == epoch and doing.step >= step
            return doing if there else None

        return self.until(look)

    def _watch(self, worker: int) -> Watch | None:
        with suppress(FileNotFoundError):
            return Watch(self.directory, worker)
        return None

    def shoot(self, *faults: Fault) -> None:
        """By the runtime's own injector."""
        self._killer = Killer(self.directory, faults)

    def hit(self, worker: int, phase: str, epoch: int) -> None:
        """Kills a worker in this phase of this epoch, be it a member or not."""
        doing = self.seen(worker, phase, epoch)
        pidfd = os.pidfd_open(doing.pid)
        try:
            self.faulted = time.monotonic()
            line = {"at": self.faulted, "worker": worker, "pid": doing.pid, "step": doing.step, "phase": doing.phase, "kind": "kill"}
            append_lines(self.directory / "faults.jsonl", [line])
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            dead = select.select([pidfd], [], [], GONE_S)[0]
            watch = self._watch(worker)
            last = watch.read() if dead and watch is not None else None
            self.hits.append(Hit(at=self.faulted, asked=phase, observed=None if last is None else last.phase))
        finally:
            os.close(pidfd)

    def end(self, process: str) -> None:
        """SIGKILL for the agent or the fork server."""
        self.faulted = time.monotonic()
        os.kill(self.members()[process], signal.SIGKILL)
        self.hits.append(Hit(at=self.faulted, asked="", observed=f"step {STEP}"))


def victims(record: Mapping[str, Any]) -> dict[str, int]:
    """The places of a worker alone in its stage, of one that is not, and of the one that coordinates; the first two do not."""
    stages = [member["stage"] for member in record["members"]]
    alone = [place for place, stage in enumerate(stages) if stages.count(stage) == 1 and place > 0]
    others = [place for place, stage in enumerate(stages) if stages.count(stage) > 1 and place > 0]
    return {"stage of one": alone[-1], "stage of several": others[0], "place 0": 0}


def holder(record: Mapping[str, Any], place: int) -> int:
    """The place of the worker that keeps the copies of the one at `place`, in the first view."""
    members = record["members"]
    in_stages = sorted(range(len(members)), key=lambda other: members[other]["stage"])
    held = replica_holders(in_stages)[place]
    assert held is not None
    return held


def opposite(record: Mapping[str, Any], place: int) -> int:
    """The place of a worker that keeps nothing for the one at `place`, nor the other way round: of four, there is one."""
    return holder(record, holder(record, place))


# The cells of the table


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a job must end that cannot go on: the class of the error, and what its message must match."""

    error: str
    says: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One job: what is done to it, where its workers linger, and how it must end (None: bit for bit as the undisturbed one).

    `deaths` is how many incidents must come of them, where that is known; `joins` has it go on until a new worker has joined. One that
    `saves` checkpoints must go back to one.
    """

    name: str
    plan: Callable[[Scene], None]
    lingers: tuple[str, ...] = ()
    end: End | None = None
    deaths: int | None = None
    joins: bool = False
    respawn: bool = False
    saves: bool = False


def in_step(phase: str, who: str) -> Cell:
    def plan(scene: Scene) -> None:
        scene.shoot(Fault((victims(scene.members())[who],), STEP, phase))

    return Cell(name=f"step: {phase}: {who}", plan=plan, lingers=(phase,) if phase in _SHORT else (), deaths=1)


def in_recovery(phase: str, who: str, first: Callable[[Mapping[str, Any], int], int]) -> Cell:
    def plan(scene: Scene) -> None:
        record = scene.members()
        place = victims(record)[who]
        scene.shoot(Fault((first(record, place),), STEP, "backward"), Fault((place,), STEP, phase))

    return Cell(name=f"recovery: {phase}: {who}", plan=plan, lingers=(phase,), deaths=1, respawn=True)


def in_join(phase: str, who: str | None) -> Cell:
    """`who` None: the worker that joins."""

    def plan(scene: Scene) -> None:
        record = scene.members()
        place = victims(record)[who or "place 0"]
        worker = record["members"][place]["worker"] if who else WORKERS
        scene.shoot(Fault((opposite(record, place),), STEP, "forward"))
        scene.members(2)
        scene.hit(worker, phase, 2 if who else 0)

    return Cell(name=f"join: {phase}: {who or 'the joiner'}", plan=plan, lingers=(phase,), joins=True, respawn=True)


def before_first_step(who: str) -> Cell:
    def plan(scene: Scene) -> None:
        record = scene.members()
        first = victims(record)["stage of several"]
        second = {"the holder of its copies": holder(record, first), "another": opposite(record, first), "place 0": 0}[who]
        scene.shoot(Fault((first,), STEP, "backward"))
        scene.hit(record["members"][second]["worker"], "forward", 2)

    return Cell(name=f"before the first step of the new view: {who}", plan=plan, deaths=1)


def while_committing(who: str) -> Cell:
    """etcd stands still from the gate on, so that the commit of the first recovery is under way when the second worker dies."""

    def plan(scene: Scene) -> None:
        record = scene.members()
        place = victims(record)[who]
        survivor = record["members"][place]["worker"]
        first = record["members"][opposite(record, place)]["worker"]
        others = [member["worker"] for member in record["members"] if member["worker"] != first]
        etcd = etcd_of(record["agent"])
        scene.seen(first, None, 1, STEP)
        scene.hit(first, "backward", 1)
        scene.seen(survivor, "gate", 1)
        with stopped(etcd):
            for worker in others:
                scene.seen(worker, "commit", 1)
            time.sleep(LINGER_S)  # their votes arrive
            scene.hit(survivor, "commit", 1)
            time.sleep(LINGER_S)

    return Cell(name=f"recovery: etcd commits: {who}", plan=plan, lingers=("gate",), deaths=1, respawn=True)


def etcd_of(agent: int) -> int:
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return next(int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text().strip() == "etcd")


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def at_once(places: Callable[[Mapping[str, Any]], tuple[int, ...]], name: str, end: End | None = None, *, saves: bool = False) -> Cell:
    def plan(scene: Scene) -> None:
        scene.shoot(Fault(places(scene.members()), STEP, "backward"))

    return Cell(name=f"at once: {name}{', with checkpoints' * saves}", plan=plan, end=end, saves=saves, respawn=saves)


def on_the_way_back(phase: str) -> Cell:
    """Two die whose loss leads back to a checkpoint, and a third one on the way."""

    def plan(scene: Scene) -> None:
        record = scene.members()
        pair = (2, holder(record, 2))
        third = next(place for place in range(len(record["members"])) if place not in pair)
        scene.shoot(Fault(pair, STEP, "backward"), Fault((third,), STEP, phase))

    return Cell(name=f"back to a checkpoint: {phase}", plan=plan, lingers=(phase,), saves=True, respawn=True)


def process(name: str, title: str, end: End) -> Cell:
    def plan(scene: Scene) -> None:
        record = scene.members()
        scene.seen(record["coordinator"], None, 1, STEP)
        scene.end(name)

    return Cell(name=f"process: {title}", plan=plan, end=end)


def cells() -> list[Cell]:
    lost = End(error="CoverageLost", says=(r"layer \d+ \[\d+, \d+\)", r"workers \[\d+, \d+\], which are lost", "SIGKILL"))
    return [
        *(in_step(phase, who) for phase in STEP_PHASES for who in ("stage of one", "stage of several", "place 0")),
        *(in_recovery(phase, who, opposite) for phase in RECOVERY_PHASES for who in ("stage of one", "stage of several", "place 0")),
        *(while_committing(who) for who in ("stage of several", "place 0")),
        *(before_first_step(who) for who in ("the holder of its copies", "another", "place 0")),
        *(in_join(phase, who) for phase in RECOVERY_PHASES for who in ("stage of several", "place 0", None)),
        at_once(lambda record: (0, opposite(record, 0)), "place 0 and one that keeps nothing of it"),
        at_once(lambda record: (1, opposite(record, 1)), "place 1 and one that keeps nothing of it"),
        at_once(lambda record: (0, holder(record, 0)), "place 0 and the holder of its copies", lost),
        at_once(lambda record: (2, holder(record, 2)), "place 2 and the holder of its copies", lost),
        at_once(
            lambda record: tuple(range(len(record["members"]))),
            "all workers",
            End(error="JobFailed", says=("all workers died at once: no copy of the state is left",)),
        ),
        at_once(lambda record: (0, holder(record, 0)), "place 0 and the holder of its copies", saves=True),
        at_once(lambda record: (2, holder(record, 2)), "place 2 and the holder of its copies", saves=True),
        at_once(lambda record: tuple(range(len(record["members"]))), "all workers", saves=True),
        *(on_the_way_back(phase) for phase in RECOVERY_PHASES),
        process("agent", "the agent", End(error="JobFailed", says=("the agent, which supervises the workers, died",))),
        process("forkserver", "the fork server", End(error="JobFailed", says=("the fork server, parent of the workers, died",))),
    ]


# Running one


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What came of a cell. `wrong` is empty if all is as it must be; `missed` tells that another phase than the one asked for was hit."""

    cell: str
    hits: list[str]
    missed: bool
    end: str
    wrong: list[str]
    tries: int
    seconds: float
    incidents: list[dict[str, Any]] = field(default_factory=list)
    log: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a job ended, and what it left."""

    result: elastic.JobResult | None
    error: Exception | None
    ended: float
    left: list[str]
    log: str


def run_job(directory: Path, cell: Cell | None, *, joins: bool) -> tuple[Outcome, Scene | None]:
    """Runs a job in `directory`, whose subdirectory `tmp` is the TMPDIR of its processes: how they are found when it is over."""
    run, tmp = directory / "run", directory / "tmp"
    run.mkdir()
    tmp.mkdir()
    if cell is not None and cell.lingers:
        linger.write(run, cell.lingers, LINGER_S, STEP)
    scene = None if cell is None else Scene(run, cell.plan)
    saved = str(directory / "saved") if cell is not None and cell.saves else None
    result = error = None
    with _quiet(directory / "log", tmp):
        try:
            result = elastic.run(
                train,
                workers=WORKERS,
                stages=STAGES,
                args=[*([LONG_STEPS, LONG_PAUSE_S if cell else 0.0] if joins else [STEPS, 0.0]), saved],
                respawn=cell is not None and cell.respawn,
                directory=run,
            )
        except elastic.errors.ElasticError as caught:
            error = caught
    ended = time.monotonic()
    return Outcome(result=result, error=error, ended=ended, left=_left(tmp), log=(directory / "log").read_text()), scene


@contextmanager
def _quiet(log: Path, tmp: Path) -> Iterator[None]:
    """Standard error of this process and of those that it starts goes to the file `log`."""
    kept, before = os.dup(2), os.environ.get("TMPDIR")
    with log.open("wb") as file:
        os.dup2(file.fileno(), 2)
    os.environ["TMPDIR"] = str(tmp)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.environ.pop("TMPDIR")
        if before is not None:
            os.environ["TMPDIR"] = before


def _left(tmp: Path) -> list[str]:
    """Processes and temporary files of a job that are still there a while after it."""
    mark, deadline = f"TMPDIR={tmp}".encode(), time.monotonic() + GONE_S
    while True:
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(f"process {entry.name} ({(entry / 'comm').read_text().strip()})")
        found += [f"file {path}" for path in tmp.iterdir()]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.02)


def run_cell(cell: Cell, calm: Mapping[str, Any], tries: int) -> Row:
    """Tries again where another phase was hit than the one asked for, unless something is wrong."""
    began, count = time.monotonic(), 0
    for _ in range(tries):
        count += 1
        with tempfile.TemporaryDirectory(prefix="elastic-kill-") as folder:
            outcome, scene = run_job(Path(folder), cell, joins=cell.joins)
            assert scene is not None
            hits = scene.close()
            wrong = [*scene.missed, *(outcome.left and [f"left: {', '.join(outcome.left)}"])]
            judge = _judge_survival if cell.end is None else _judge_end
            wrong += judge(cell, scene, outcome, calm)
        missed = any(hit.missed for hit in hits)
        if not missed or (wrong and cell.end is None):
            break
    incidents = [] if outcome.result is None else list(outcome.result.incidents)
    end = "trained on" if outcome.error is None else f"{type(outcome.error).__name__}: {outcome.error}"
    return Row(
        cell=cell.name,
        hits=[str(hit) for hit in hits],
        missed=missed,
        end=end,
        wrong=wrong,
        tries=count,
        seconds=round(time.monotonic() - began, 1),
        incidents=incidents,
        log=outcome.log if wrong else "",
    )


def _judge_survival(cell: Cell, scene: Scene, outcome: Outcome, calm: Mapping[str, Any]) -> list[str]:
    if outcome.result is None:
        return [f"the job ended: {outcome.error}"]
    wrong = []
    value = outcome.result.value
    if value["losses"] != calm["losses"]:
        different = [step for step, pair in enumerate(zip(value["losses"], calm["losses"], strict=False)) if pair[0] != pair[1]]
        wrong.append(f"losses differ in steps {different}, and there are {len(value['losses'])}")
    if value["digest"] != calm["digest"]:
        wrong.append("the parameters differ")
    for path in sorted(scene.directory.glob("steps-*.jsonl")):
        steps = [line["step"] for line in read_lines(path)]
        if steps != list(range(steps[0], steps[0] + len(steps))) if steps else False:
            wrong.append(f"{path.stem} was given {steps}")
    incidents = outcome.result.incidents
    over = [incident for incident in incidents if incident["kind"] != "join" or incident["epoch"] is not None]
    for incident in over:
        if incident["samples_lost"] != 0:
            wrong.append(f"samples lost: {incident['samples_lost']}")
        if incident["bytes_moved"] is None or incident["bytes_moved"] != incident["bytes_minimum"]:
            wrong.append(f"{incident['bytes_moved']} bytes moved, the minimum is {incident['bytes_minimum']}")
    members = {line["worker"] for line in read_lines(scene.directory / "faults.jsonl")} - {WORKERS}
    told = {worker for incident in incidents for worker in (incident["worker"], *incident["also"])}
    if members - told and not any(hit.missed for hit in scene.hits):  # who has finished may die
        wrong.append(f"no incident names {sorted(members - told)}")
    deaths = [incident for incident in incidents if incident["kind"] == "death"]
    if cell.saves and not any(death["restored"] for death in deaths):
        wrong.append("it did not go back to a checkpoint")
    if cell.deaths not in (None, len(deaths)) and not any(hit.missed for hit in scene.hits):
        wrong.append(f"there are {len(deaths)} incidents with deaths instead of {cell.deaths}")
    if cell.joins and not any(incident["joined"] and incident["epoch"] is not None for incident in incidents):
        wrong.append("nobody has joined")
    return wrong


def _judge_end(cell: Cell, scene: Scene, outcome: Outcome, calm: Mapping[str, Any]) -> list[str]:
    assert cell.end is not None
    if outcome.error is None:
        return ["the job went on"]
    wrong = [] if type(outcome.error).__name__ == cell.end.error else [f"it is a {type(outcome.error).__name__}"]
    wrong += [f"the message does not tell {says!r}" for says in cell.end.says if not re.search(says, str(outcome.error))]
    wrong += ["the message has a traceback"] if "Traceback" in str(outcome.error) else []
    took = outcome.ended - (scene.faulted or outcome.ended)
    return wrong + ([f"it took {took:.1f} s to end"] if took > END_S else [])


# The table


def show(rows: list[Row]) -> Table:
    table = Table(title="SIGKILL, and what became of the job", row_styles=["", "dim"])
    for title in ("where: whom", "hit in", "end", "incidents: attempts, stall, moved"):
        table.add_column(title)
    table.add_column("tries", justify="right")
    table.add_column("")
    for row in rows:
        verdict = "[green]right"
        if row.wrong:
            verdict = f"[red]wrong: {escape('; '.join(row.wrong))}"
        elif row.missed:
            verdict = "[yellow]right, but not hit where asked"
        incidents = "\n".join(map(_incident, row.incidents))
        table.add_row(row.cell, ", ".join(row.hits), escape(_end(row)), incidents, str(row.tries), verdict)
    return table


def _end(row: Row) -> str:
    if row.end != "trained on":
        return row.end if len(row.end) < 300 else f"{row.end[:300]}..."
    return "same losses, same parameters" if not row.wrong else "trained on"


def _incident(incident: Mapping[str, Any]) -> str:
    if incident["epoch"] is None:
        return f"{incident['kind']}: not finished"
    stall = "" if incident["stall_ms"] is None else f", {incident['stall_ms']:.0f} ms"
    least = "" if incident["bytes_moved"] == incident["bytes_minimum"] else f" of {incident['bytes_minimum']:,}"
    return f"{incident['kind']}: {incident['attempts']}{stall}, {incident['bytes_moved'] or 0:,} B{least}"


def main(
    only: Annotated[str, typer.Option(help="Cells whose name has this in it, or matches it as a pattern with * and ?.")] = "",
    tries: Annotated[int, typer.Option(help="How often a cell is tried until the phase that it asks for is hit.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")] = None,
) -> None:
    """A table of kills; fails if any job is not what it should have been."""
    chosen = [cell for cell in cells() if only in cell.name or fnmatch.fnmatch(cell.name, only)]
    if not chosen:
        raise typer.BadParameter(f"--only {only}: no cell has such a name")
    console = Console(highlight=False)
    calm: dict[bool, dict[str, Any]] = {}
    for joins in sorted({cell.joins for cell in chosen}):
        with tempfile.TemporaryDirectory(prefix="elastic-kill-") as folder:
            outcome, _ = run_job(Path(folder), None, joins=joins)
        if outcome.result is None:
            print(f"the undisturbed job failed: {outcome.error}\n{outcome.log}", file=sys.stderr)
            raise typer.Exit(1)
        calm[joins] = outcome.result.value
    rows = []
    for number, cell in enumerate(chosen, 1):
        rows.append(row := run_cell(cell, calm[cell.joins], tries))
        verdict = f"wrong: {'; '.join(row.wrong)}" if row.wrong else "right"
        console.print(f"{number}/{len(chosen)}  {row.seconds:4.1f} s  {row.cell}: hit in {', '.join(row.hits)}: {verdict}", markup=False)
    console.print(show(rows))
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if wrong := [row for row in rows if row.wrong]:
        for row in wrong:
            console.print(f"\n{row.cell}: {'; '.join(row.wrong)}\n{row.log}", markup=False)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
