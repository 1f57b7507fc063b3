"""What `elastic chaos shrink` does: runs parts of a schedule that fails, until none can be left out."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic.chaos import trial
from elastic.chaos.report import load, write
from elastic.chaos.scenario import written
from elastic.chaos.schedule import Schedule
from elastic.chaos.shrink import shrunk
from elastic.cli.chaos_run import CODES, Options, check_outputs, cleaning_up, known_run
from elastic.errors import SettingsError


def shrink(path: Path, out: Path, tries: int, options: Options) -> int:
    """Shrinks the schedule of a report, writes the smallest one to `out`, and returns the exit code. Raises SettingsError."""
    check_outputs(out, options.json_file, options.html)
    known = known_run(options.calm)
    schedule, data = load(path)
    wanted = _failing(path, data)

    def fails(candidate: Schedule) -> bool:
        for _ in range(tries):
            with cleaning_up():
                record = trial.run(candidate, calm=known, patience_s=options.patience_s)
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
    if options.json_file is not None:
        write(options.json_file, data)
    if options.html is not None:
        from elastic.chaos.html import page  # needs more than a run does

        options.html.write_text(page(data, str(path)), encoding="utf-8")
    print(f"{len(smallest.injections)} of {len(schedule.injections)} faults are enough: {_again(out, options)}")
    return 0


def _failing(path: Path, data: Mapping[str, Any]) -> set[str]:
    """The oracles that fail in a report. Raises SettingsError if none does, or if the report says nothing of them."""
    try:
        found = {finding["oracle"] for finding in data["findings"] if finding["verdict"] == "fail"}
        verdict = data["verdict"]
    except (KeyError, TypeError):
        raise SettingsError(f"{path} is no whole report of `elastic chaos run --json`: it has no verdict, or no findings") from None
    if not found:
        raise SettingsError(f"{path} has the verdict {verdict}: only a schedule that fails can be shrunk")
    return found


def _again(out: Path, options: Options) -> str:
    """The command that runs the smallest schedule as it was run here."""
    words = ["elastic", "chaos", "run", str(out)]
    words += [] if options.calm is None else ["--reference", str(options.calm)]
    words += [] if options.patience_s == trial.PATIENCE_S else ["--patience", f"{options.patience_s:g}"]
    return shlex.join(words)
