"""Examines the train function of a job before anything of the job starts: its module is imported as workers do, in a process of its own."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from elastic.chaos.schedule import BUILT_IN, JobSpec
from elastic.chaos.spawning import environment
from elastic.errors import ElasticError, SettingsError, TrainFunctionError
from elastic.script import target

_OURS = f"{Path(__file__).parents[1]}{os.sep}"
_LIMIT_S, _SHOWN = 300.0, 1500


def check(job: JobSpec) -> None:
    """Raises TrainFunctionError if workers could not import the job's train function, or if it does not take the job's arguments.

    A function is examined once in a process.
    """
    if job.script != BUILT_IN:
        _examined(target.name_of(job.script), json.dumps(job.args))


@functools.cache
def _examined(script: str, args: str) -> None:
    command = [sys.executable, "-m", __name__, script, args]
    try:
        ended = subprocess.run(
            command,
            check=False,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            env=environment(),
            timeout=_LIMIT_S,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        raise TrainFunctionError(_said(script, f"its import does not end within {_LIMIT_S:g} s")) from None
    answer = ended.stdout.rpartition("\n")[2]
    if not answer:
        code, words = ended.returncode, ended.stderr.strip()[-_SHOWN:]
        raise TrainFunctionError(_said(script, f"the process that imports it ends with exit code {code}. {words}".strip()))
    if (error := json.loads(answer)["error"]) is not None:
        raise TrainFunctionError(error)


def _said(script: str, what: str) -> str:
    place = script.rpartition(":")[0]
    return f"{place} cannot be imported, so no job was started: {what}"


def error_of(script: str, args: tuple[Any, ...]) -> str | None:
    """Imports the function in this process; returns what is wrong with it, None if nothing is."""
    place, _, qualified = script.rpartition(":")
    try:
        function = target.load(script)
        if qualified == target.WHOLE:
            compile(Path(place).read_bytes(), place, "exec")
        target.call_arguments(function, None, args)
    except ElasticError as error:
        return str(error)
    except SystemExit as error:
        return _said(script, f'it calls sys.exit({error.code!r}) while it is imported: put that under `if __name__ == "__main__":`')
    except BaseException as error:  # the user's code may raise anything; this process only reports it
        return _said(script, _traceback(error))
    return None


def _traceback(error: BaseException) -> str:
    """The last line of a traceback, and below it the frames of the user's code."""
    last = traceback.format_exception_only(error)[-1].strip()
    frames = [each for each in traceback.extract_tb(error.__traceback__) if not each.filename.startswith((_OURS, "<frozen"))]
    return "\n".join([last, *(line.rstrip() for line in traceback.format_list(frames))])


def _refuse(*_: Any, **__: Any) -> None:
    raise SettingsError(
        "the script starts a job while it is imported, and workers import it: put the call of elastic.run under "
        '`if __name__ == "__main__":`'
    )


def main(script: str, args: str) -> None:
    """Prints `{"error": ...}` as the last line; what the user's modules print goes to stderr."""
    from elastic.launch import run

    answers = os.dup(1)
    os.dup2(2, 1)
    run.launched = _refuse
    error = error_of(script, tuple(json.loads(args)))
    os.write(answers, f"\n{json.dumps({'error': error})}".encode())
    os._exit(0)  # threads of the user's modules must not keep it alive


if __name__ == "__main__":
    main(*sys.argv[1:])
