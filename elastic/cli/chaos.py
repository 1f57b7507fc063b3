"""`elastic chaos`: trains under faults, and says whether the training was hurt."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from elastic.chaos.kinds import ALL, KINDS
from elastic.cli.plan import argument
from elastic.errors import ElasticError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Trains under real faults, and says, with evidence, whether it was hurt.",
)
_EPILOG = "Exit codes: 0 pass, 1 fail, 2 wrong arguments or a machine without what a fault needs, 4 unknown (the reason is printed)."

Json = Annotated[Path | None, typer.Option("--json", help="Write the report as JSON to this file (docs/chaos.md has its fields).")]
Html = Annotated[Path | None, typer.Option("--html", help="Write the report as one HTML page to this file.")]
Calm = Annotated[Path | None, typer.Option("--reference", help="Compare with this undisturbed run, a file of ~/.cache/elastic-chaos.")]
Patience = Annotated[float, typer.Option(min=1.0, help="End a job that makes no step for so many seconds: it fails.")]
Keep = Annotated[Path | None, typer.Option("--keep", help="Keep all files of the run in this new folder: logs, notes of workers, etcd.")]


@contextmanager
def _refusing() -> Iterator[None]:
    """Prints an error in one line, and exits with its code."""
    try:
        yield
    except ElasticError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None


@app.command("list")
def list_kinds(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False) -> None:
    """Shows every fault, how it is injected, and what it needs."""
    if as_json:
        names = ("name", "injected", "needs", "seconds", "hosts")
        print(json.dumps([{name: getattr(kind, name) for name in names} for kind in ALL]))
        return
    table = Table("fault", "how it is injected", "needs", "lasts")
    for kind in ALL:
        hosts = [f"{kind.hosts} hosts"] if kind.hosts > 1 else []
        needs = [*hosts, *([] if kind.needs == "nothing" else [kind.needs])]
        table.add_row(kind.name, kind.injected, "; ".join(needs) or "nothing", "" if kind.seconds is None else f"{kind.seconds:g} s")
    Console().print(table)


@app.command(epilog=_EPILOG)
def run(
    scenario: Annotated[Path | None, typer.Argument(help="A TOML file with a job and its faults; without one, faults are random.")] = None,
    script: Annotated[str | None, typer.Option(help="Your train function: path.py:function or module:function.")] = None,
    args: Annotated[
        list[str] | None, typer.Option("--arg", help="An argument of it after the job, a JSON value or plain string. Repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random faults follow from it.")] = 0,
    minutes: Annotated[float | None, typer.Option(help="How long the job trains; a script that ends earlier ends it. Default 1.")] = None,
    mtbf: Annotated[float, typer.Option(help="Mean seconds between random faults.")] = 6.0,
    faults: Annotated[str | None, typer.Option(help=f"Kinds of random faults, by commas: {','.join(KINDS)}.")] = None,
    fault: Annotated[list[str] | None, typer.Option(help="Instead, this one: kill@12:backward, stop@3.5s place=1. Repeatable.")] = None,
    hosts: Annotated[int | None, typer.Option(help="Hosts (network namespaces, or TCP proxies without root). By default 1.")] = None,
    workers: Annotated[int | None, typer.Option(help="Workers of each host. By default 3.")] = None,
    stages: Annotated[int | None, typer.Option(help="Pipeline stages; by default the planner chooses.")] = None,
    spares: Annotated[int | None, typer.Option(help="Spares of each host.")] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Save every so many steps, also if the script does not; 0: not. Default 20.")
    ] = None,
    json_file: Json = None,
    html: Html = None,
    calm: Calm = None,
    patience: Patience = 120.0,
    keep: Keep = None,
) -> None:
    """Runs a training under faults. By default a small GPT of its own, for a minute, under random faults of all kinds that fit."""
    given = {"script": script, "minutes": minutes, "hosts": hosts, "workers": workers, "stages": stages, "spares": spares}
    given["checkpoint_every"] = checkpoint_every
    job = {name: value for name, value in given.items() if value is not None}
    if args:
        job["args"] = [argument(text) for text in args]
    with suppress(FileNotFoundError):
        sys.path.insert(0, str(Path.cwd()))
    from elastic.cli import chaos_run  # it needs more than the list does
    from elastic.cli.chaos_schedule import schedule_of

    with _refusing():
        schedule = schedule_of(scenario, job, seed, mtbf, faults, fault)
        options = chaos_run.Options(json_file=json_file, html=html, keep=keep, calm=calm, patience_s=patience)
        raise typer.Exit(chaos_run.run(schedule, options))


@app.command(epilog=_EPILOG)
def replay(
    report: Annotated[Path, typer.Argument(help="A report of --json.")],
    json_file: Json = None,
    html: Html = None,
    calm: Calm = None,
    patience: Patience = 120.0,
    keep: Keep = None,
) -> None:
    """Runs the schedule of a report again."""
    from elastic.chaos.report import load
    from elastic.cli import chaos_run

    with _refusing():
        options = chaos_run.Options(json_file=json_file, html=html, keep=keep, calm=calm, patience_s=patience)
        raise typer.Exit(chaos_run.run(load(report)[0], options))


@app.command(epilog=_EPILOG)
def shrink(
    report: Annotated[Path, typer.Argument(help="A report of --json that failed.")],
    out: Annotated[Path, typer.Option("--out", help="Write the smallest schedule here, as a scenario.")] = Path("smallest.toml"),
    tries: Annotated[int, typer.Option(min=1, help="Runs of each schedule; it fails if one of them does.")] = 1,
    json_file: Json = None,
    html: Html = None,
    calm: Calm = None,
    patience: Patience = 120.0,
) -> None:
    """Looks for the smallest schedule that still fails as the report says, by running parts of it. --json: write that report anew."""
    from elastic.cli import chaos_run, chaos_shrink

    with _refusing():
        options = chaos_run.Options(json_file=json_file, html=html, calm=calm, patience_s=patience)
        raise typer.Exit(chaos_shrink.shrink(report, out, tries, options))
