"""Soaks the runtime: many random schedules of at least five faults each, over layouts, checkpoints and numbers of hosts; resumable.

    python benchmarks/soak.py --count 200 --folder build/soak         # `make soak`; called again, it goes on where it was
    python benchmarks/soak.py --count 200 --folder build/soak --table # only the table of what is there

Each schedule follows from its number: schedule 7 is the same wherever it is run. The folder has a report of each, and `summary.json`. One
that fails is repeated with `elastic chaos replay build/soak/0007.json`, and made small with `elastic chaos shrink`.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from elastic.chaos import reference, trial
from elastic.chaos.random_schedule import drawn
from elastic.chaos.report import report, write
from elastic.chaos.schedule import JobSpec, Schedule
from elastic.cli.chaos_run import cleaning_up

_FAULTS = 5
_LAYOUTS = ((2, None), (3, None), (3, 2), (4, 2), (4, 4), (2, 2))
_MTBF_S, _AFTER_S = 2.0, 0.5
_KEPT_STEPS = 1000  # the undisturbed run: few schedules have more steps, and then it is made anew


def schedule_of(number: int, hosts_most: int = 3) -> Schedule:
    """The schedule of this number."""
    generator = random.Random(f"soak {number}")
    hosts = 1 + number % hosts_most
    workers, stages = generator.choice(_LAYOUTS)
    if hosts > 1:
        workers, stages = min(workers, 2), None if stages is None else min(stages, 2)
    every, spares = generator.choice((0, 20)), generator.choice((0, 0, 1))
    job = JobSpec(hosts=hosts, workers=workers, stages=stages, spares=spares, checkpoint_every=every, minutes=10.0)
    made = drawn(job, number, _MTBF_S, faults=_FAULTS)
    last = max((each.time or 0.0) + each.lasts_s for each in made.injections)
    return Schedule(
        job=JobSpec.from_json({**job.to_json(), "minutes": round((last + _AFTER_S) / 60, 3)}), injections=made.injections, seed=number
    )


def soaked(number: int, schedule: Schedule, path: Path) -> dict[str, Any]:
    """Runs a schedule, and writes and returns its report."""
    began = time.monotonic()
    reference.reference(schedule.job, _KEPT_STEPS, print)
    known = report(trial.run(schedule))
    write(path, known)
    line = row_of(number, known)
    why = "" if line["verdict"] == "pass" else f": {line['reasons'][0]}"
    took = time.monotonic() - began
    print(f"{number:4}  {line['layout']}; {', '.join(line['kinds'])}; {took:.0f} s: {line['verdict']}{why}", flush=True)
    return known


def row_of(number: int, data: dict[str, Any]) -> dict[str, Any]:
    """The summary of a report."""
    job, goodput = data["schedule"]["job"], data["goodput"]
    stages = job["stages"] or "-"
    layout = f"{job['hosts']} x {job['workers']} workers, {stages} stages"
    more = [*(["saves"] if job["checkpoint_every"] else []), *(["spare"] if job["spares"] else [])]
    return {
        "number": number,
        "layout": ", ".join([layout, *more]),
        "hosts": job["hosts"],
        "kinds": [fault["kind"] for fault in data["faults"]],
        "verdict": data["verdict"],
        "reasons": data["reasons"],
        "steps": data["steps"],
        "incidents": len(data["incidents"]),
        "goodput": None if goodput is None else goodput["share"],
        "longest_stall_s": max((each["seconds"] for each in data["stalls"]), default=0.0),
    }


def table_of(rows: list[dict[str, Any]]) -> Table:
    """All schedules, by number of hosts."""
    table = Table("hosts", "schedules", "pass", "fail", "unknown", "faults", "steps", "incidents", "median goodput", "longest stall")
    for hosts in [*sorted({row["hosts"] for row in rows}), None]:
        known = [row for row in rows if hosts in (None, row["hosts"])]
        verdicts = Counter(row["verdict"] for row in known)
        shares = [row["goodput"] for row in known if row["goodput"] is not None]
        sums = [sum(len(row["kinds"]) for row in known), sum(row["steps"] for row in known), sum(row["incidents"] for row in known)]
        figures = [len(known), verdicts["pass"], verdicts["fail"], verdicts["unknown"], *sums]
        goodput = f"{statistics.median(shares):.0%}" if shares else "-"
        longest = max((row["longest_stall_s"] for row in known), default=0.0)
        table.add_row("all" if hosts is None else str(hosts), *map(str, figures), goodput, f"{longest:.1f} s")
    return table


def main(
    count: Annotated[int, typer.Option(help="How many schedules.")] = 200,
    first: Annotated[int, typer.Option(help="The number of the first one.")] = 0,
    folder: Annotated[Path, typer.Option(help="Where reports are kept.")] = Path("build/soak"),
    hosts: Annotated[int, typer.Option(min=1, help="The most hosts of a job.")] = 3,
    only_table: Annotated[bool, typer.Option("--table", help="Run nothing.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Run those again that did not pass.")] = False,
) -> None:
    """Runs the schedules that have no report yet, and prints a table. The exit code is 1 if one fails, 4 if one is unknown."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(first, first + count):
        path, schedule = folder / f"{number:04}.json", schedule_of(number, hosts)
        known = json.loads(path.read_text()) if path.exists() else None
        if known is not None and known["schedule"] != schedule.to_json():
            known = None  # it is of another version, whose schedule of this number was another one
        if not only_table and (known is None or (again and known["verdict"] != "pass")):
            with cleaning_up():
                known = soaked(number, schedule, path)
        if known is not None:
            rows.append(row_of(number, known))
            write(folder / "summary.json", {"schedules": rows})
    console = Console()
    console.print(table_of(rows))
    for line in rows:
        if line["verdict"] != "pass":
            console.print(f"{line['number']:04}: {line['verdict']}: {line['reasons'][0]}", markup=False, soft_wrap=True)
    verdicts = {line["verdict"] for line in rows}
    raise typer.Exit(1 if "fail" in verdicts else 4 if "unknown" in verdicts else 0)


if __name__ == "__main__":
    typer.run(main)
