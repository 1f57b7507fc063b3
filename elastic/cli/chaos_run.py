"""What `elastic chaos run` and `elastic chaos replay` do: a run of a schedule, its report, and the exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from elastic.chaos import reference, trial
from elastic.chaos.evidence import Reference
from elastic.chaos.report import report, write
from elastic.chaos.schedule import Schedule
from elastic.errors import SettingsError

CODES = {"pass": 0, "fail": 1, "unknown": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of commands that run schedules: files for the report, the folder for all files of a run, the file of the undisturbed run
    to compare with, and the seconds without a step after which a job is ended."""

    json_file: Path | None = None
    html: Path | None = None
    keep: Path | None = None
    calm: Path | None = None
    patience_s: float = trial.PATIENCE_S


def run(schedule: Schedule, options: Options) -> int:
    """Runs a schedule, prints and writes its report, and returns the exit code of its verdict. Raises SettingsError."""
    check_outputs(options.json_file, options.html)
    keep = options.keep
    if keep is not None:
        _check_keep(keep)
    known = known_run(options.calm)
    job = schedule.job
    hosts = f"{job.hosts} hosts with {job.workers} workers each" if job.hosts > 1 else f"{job.workers} workers"
    print(f"{job.script} on {hosts}, {len(schedule.injections)} faults, seed {schedule.seed}", flush=True)
    with cleaning_up():
        record = trial.run(schedule, lambda line: print(line, flush=True), keep=keep, calm=known, patience_s=options.patience_s)
    data = report(record)
    if options.json_file is not None:
        write(options.json_file, data)
    if options.html is not None:
        from elastic.chaos.html import page  # needs more than a run does

        options.html.write_text(page(data, None if options.json_file is None else str(options.json_file)), encoding="utf-8")
    _print(record, data)
    return CODES[record.verdict]


def _check_keep(keep: Path) -> None:
    try:
        if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
            raise SettingsError(f"--keep {keep}: files of a run are kept in a new or empty folder, and this is none")
        keep.mkdir(parents=True, exist_ok=True)
        if not os.access(keep, os.W_OK | os.X_OK):
            raise SettingsError(f"--keep {keep}: nothing can be written into this folder: Permission denied")
    except OSError as error:
        raise SettingsError(f"--keep {keep}: files cannot be kept there: {error.strerror}") from None


def known_run(calm: Path | None) -> Reference | None:
    """The undisturbed run of a file, None without one. Raises SettingsError if the file has none."""
    known = None if calm is None else reference.read(calm)
    if calm is not None and known is None:
        raise SettingsError(f"--reference {calm}: there is no undisturbed run in this file")
    return known


def check_outputs(*paths: Path | None) -> None:
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
def cleaning_up() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP ordinary ends of this program, so that processes, mounts and namespaces are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print(record: trial.Record, data: dict[str, Any]) -> None:
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
    print(trial.summary(record))
