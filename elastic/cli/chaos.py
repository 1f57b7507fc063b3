"""`elastic chaos`: trains under faults, and says whether the training was hurt."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from elastic.chaos.kinds import ALL, KINDS
from elastic.cli.plan import argument
from elastic.errors import ElasticError, SettingsError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Trains under real faults, and says, with evidence, whether it was hurt.",
)
CODES = {"pass": 0, "fail": 1, "unknown": 4}
_EPILOG = "Exit codes: 0 pass, 1 fail, 2 wrong arguments or a machine without what a fault needs, 4 unknown (the reason is printed)."

Json = Annotated[Path | None, typer.Option("--json", help="Write the report as JSON to this file (docs/chaos.md has its fields).")]
Html = Annotated[Path | None, typer.Option("--html", help="Write the report as one HTML page to this file.")]
Calm = Annotated[Path | None, typer.Option("--reference", help="Compare with this undisturbed run, a file of ~/.cache/elastic-chaos.")]
Patience = Annotated[float, typer.Option(min=1.0, help="End a job that makes no step for so many seconds: it fails.")]
Keep = Annotated[Path | None, typer.Option("--keep", help="Keep all files of the run in this new folder: logs, notes of workers, etcd.")]


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
    minutes: Annotated[float, typer.Option(help="How long the job trains; a script that ends earlier ends it.")] = 1.0,
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
    given = {"script": script, "hosts": hosts, "workers": workers, "stages": stages, "spares": spares, "checkpoint_every": checkpoint_every}
    job = {name: value for name, value in given.items() if value is not None}
    if args:
        job["args"] = [argument(text) for text in args]
    with suppress(FileNotFoundError):
        sys.path.insert(0, str(Path.cwd()))
    try:
        schedule = _schedule(scenario, job, seed, minutes, mtbf, faults, fault)
        _run(schedule, json_file, html, keep, calm, patience)
    except ElasticError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None


def _schedule(
    scenario: Path | None, job: dict[str, Any], seed: int, minutes: float, mtbf: float, faults: str | None, fault: list[str] | None
) -> Any:
    from elastic.chaos import injection
    from elastic.chaos import scenario as scenarios
    from elastic.chaos.random_schedule import drawn
    from elastic.chaos.schedule import JobSpec, Schedule
    from elastic.script.target import name_of

    if "script" in job:
        job["script"] = name_of(job["script"])
    if scenario is not None:
        if faults or fault:
            raise SettingsError("a scenario has its own faults: leave --faults and --fault out, or the scenario")
        known = scenarios.load(scenario)
        return Schedule.from_json({**known.to_json(), "job": {**known.job.to_json(), **job}})
    spec = JobSpec.from_json({"checkpoint_every": 20, "minutes": minutes, **job})
    if fault:
        if faults:
            raise SettingsError("give either --faults (kinds of random faults) or --fault (a fault)")
        return Schedule(job=spec, injections=tuple(map(injection.parse, fault)), seed=seed)
    kinds = None if faults is None else [name.strip() for name in faults.split(",") if name.strip()]
    if kinds == []:
        raise SettingsError("--faults names no kind: leave it out for all that fit, or see `elastic chaos list`")
    return drawn(spec, seed, mtbf, kinds)


def _run(
    schedule: Any, json_file: Path | None, html: Path | None, keep: Path | None, calm: Path | None = None, patience_s: float = 120.0
) -> None:
    """Runs a schedule, prints and writes its report, and exits with the code of its verdict."""
    from elastic.chaos import trial
    from elastic.chaos.report import report, write

    _check_outputs(json_file, html)
    if keep is not None and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise SettingsError(f"--keep {keep}: files of a run are kept in a new or empty folder, and this is none")
    known = _known(calm)
    job = schedule.job
    hosts = f"{job.hosts} hosts with {job.workers} workers each" if job.hosts > 1 else f"{job.workers} workers"
    print(f"{job.script} on {hosts}, {len(schedule.injections)} faults, seed {schedule.seed}", flush=True)
    with _cleaning_up():
        record = trial.run(schedule, lambda line: print(line, flush=True), keep=keep, calm=known, patience_s=patience_s)
    data = report(record)
    if json_file is not None:
        write(json_file, data)
    if html is not None:
        from elastic.chaos.html import page  # needs more than a run does

        html.write_text(page(data, None if json_file is None else str(json_file)))
    _print(record, data)
    raise typer.Exit(CODES[record.verdict])


def _known(calm: Path | None) -> Any:
    """The undisturbed run of a file. Raises SettingsError if there is none."""
    from elastic.chaos import reference

    known = None if calm is None else reference.read(calm)
    if calm is not None and known is None:
        raise SettingsError(f"--reference {calm}: there is no undisturbed run in this file")
    return known


def _check_outputs(*paths: Path | None) -> None:
    """Refuses files that cannot be written, before a run rather than behind it. Raises SettingsError."""
    for path in filter(None, paths):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a"):
                pass
            if path.stat().st_size == 0:
                path.unlink()
        except OSError as error:
            raise SettingsError(f"the report cannot be written to {path}: {error.strerror}") from None


@contextmanager
def _cleaning_up() -> Iterator[None]:
    """Makes SIGTERM an ordinary end of this program, so that processes, mounts and namespaces are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print(record: Any, data: dict[str, Any]) -> None:
    from elastic.chaos.trial import summary

    table = Table("oracle", "verdict", "why")
    colours = {"pass": "green", "fail": "red", "unknown": "yellow"}
    for finding in record.findings:
        table.add_row(finding.oracle, Text(finding.verdict, colours[finding.verdict]), Text(finding.reason))
    Console().print(table)
    goodput = data["goodput"]
    if goodput is not None:
        print(
            f"goodput: {goodput['steps']} steps in {goodput['seconds']:.0f} s, {goodput['share']:.0%} of what the surviving workers allow"
        )
    print(summary(record))


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

    try:
        schedule, _ = load(report)
        _run(schedule, json_file, html, keep, calm, patience)
    except ElasticError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None


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
    try:
        raise typer.Exit(_shrink(report, out, tries, (json_file, html), calm, patience))
    except ElasticError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None


def _shrink(path: Path, out: Path, tries: int, files: tuple[Path | None, Path | None], calm: Path | None, patience_s: float) -> int:
    from elastic.chaos import trial
    from elastic.chaos.report import load, write
    from elastic.chaos.scenario import written
    from elastic.chaos.shrink import shrunk

    json_file, html = files
    _check_outputs(out, json_file, html)
    known = _known(calm)
    schedule, data = load(path)
    wanted = {finding["oracle"] for finding in data["findings"] if finding["verdict"] == "fail"}
    if not wanted:
        raise SettingsError(f"{path} has the verdict {data['verdict']}: only a schedule that fails can be shrunk")

    def fails(candidate: Any) -> bool:
        for _ in range(tries):
            with _cleaning_up():
                record = trial.run(candidate, calm=known, patience_s=patience_s)
            found = {finding.oracle for finding in record.findings if finding.verdict == "fail"}
            what = f"fails ({', '.join(sorted(found))})" if found else record.verdict
            print(f"{len(candidate.injections)} faults ({', '.join(map(str, candidate.injections)) or 'none'}): {what}", flush=True)
            if found & wanted:
                return True
        return False

    if not fails(schedule):
        print(f"the schedule did not fail again in {tries} run(s): try more with --tries", file=sys.stderr)
        return CODES["unknown"]
    smallest = shrunk(schedule, fails)
    out.write_text(written(smallest))
    data["shrunk"] = smallest.to_json()
    if json_file is not None:
        write(json_file, data)
    if html is not None:
        from elastic.chaos.html import page

        html.write_text(page(data, str(path)))
    print(f"{len(smallest.injections)} of {len(schedule.injections)} faults are enough: elastic chaos run {out}")
    return 0
