"""Kills workers in every phase of a step and of a recovery, and shows whether each job has bit for bit the results of an undisturbed one.

    python examples/kill_table.py
    python examples/kill_table.py --only apply --json table.json

Every line is a real job: a small GPT on four workers in three stages. One worker dies, or any number at once, all four too: the job goes on
from the memory of their host, without a checkpoint. Workers wait in phases that are too short to be hit. The workers of jobs "without
segments" keep copies of each other's state instead, as hosts do, and go back to a checkpoint if these are lost too.
"""

from __future__ import annotations

import fnmatch
import json
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from kill_cells import cells
from killing import WORKERS, KillCell, Outcome, Scene, run_job
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from elastic.observe.json_lines import read_lines

END_S = 10.0
"""How long after the last fault a job that cannot continue may take to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow:
    """The result of a cell. `wrong` is empty if the job ended as it must; `missed` if the fault hit a phase other than requested."""

    cell: str
    hits: list[str]
    missed: bool
    end: str
    wrong: list[str]
    tries: int
    seconds: float
    incidents: list[dict[str, Any]] = field(default_factory=list)
    log: str = ""


def run_cell(cell: KillCell, calm: Mapping[str, Any], tries: int) -> TableRow:
    """Runs a cell; runs it again if the fault hit another phase than the requested one, unless something is wrong."""
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
    return TableRow(
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


def _judge_survival(cell: KillCell, scene: Scene, outcome: Outcome, calm: Mapping[str, Any]) -> list[str]:
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
            wrong.append(f"{path.stem} has the steps {steps}")
    incidents = outcome.result.incidents
    over = [incident for incident in incidents if incident["kind"] != "join" or incident["epoch"] is not None]
    for incident in over:
        if incident["samples_lost"] != 0:
            wrong.append(f"samples lost: {incident['samples_lost']}")
        if incident["bytes_moved"] is None or incident["bytes_moved"] != incident["bytes_minimum"]:
            wrong.append(f"{incident['bytes_moved']} bytes moved, the minimum is {incident['bytes_minimum']}")
    members = {line["worker"] for line in read_lines(scene.directory / "faults.jsonl")} - {WORKERS}
    named = {worker for incident in incidents for worker in (incident["worker"], *incident["also"])}
    if members - named and not any(hit.missed for hit in scene.hits):  # a worker that has finished may die without an incident
        wrong.append(f"no incident names {sorted(members - named)}")
    deaths = [incident for incident in incidents if incident["kind"] == "death"]
    restored = any(death["restored"] for death in deaths)
    if restored is cell.segments:
        wrong.append("the job reloaded a checkpoint" if restored else "the job did not reload a checkpoint")
    if cell.deaths not in (None, len(deaths)) and not any(hit.missed for hit in scene.hits):
        wrong.append(f"there are {len(deaths)} incidents with deaths instead of {cell.deaths}")
    if cell.joins and not any(incident["joined"] and incident["epoch"] is not None for incident in incidents):
        wrong.append("no worker has joined")
    return wrong


def _judge_end(cell: KillCell, scene: Scene, outcome: Outcome, calm: Mapping[str, Any]) -> list[str]:
    assert cell.end is not None
    if outcome.error is None:
        return ["the job did not fail"]
    wrong = [] if type(outcome.error).__name__ == cell.end.error else [f"the error is a {type(outcome.error).__name__}"]
    wrong += [f"the message lacks {says!r}" for says in cell.end.says if not re.search(says, str(outcome.error))]
    wrong += ["the message has a traceback"] if "Traceback" in str(outcome.error) else []
    took = outcome.ended - (scene.faulted or outcome.ended)
    return wrong + ([f"it took {took:.1f} s to end"] if took > END_S else [])


# The table


def show(rows: list[TableRow]) -> Table:
    table = Table(title="SIGKILL, and how the job ended", row_styles=["", "dim"])
    for title in ("where: which worker", "hit in", "end", "incidents: attempts, stall, moved"):
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


def _end(row: TableRow) -> str:
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
    only: Annotated[str, typer.Option(help="Cells whose name contains this, or matches it as a pattern with * and ?.")] = "",
    tries: Annotated[int, typer.Option(help="How often a cell is tried until its phase is hit.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")] = None,
) -> None:
    """Prints a table of kills; fails if any job did not end as it must."""
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
