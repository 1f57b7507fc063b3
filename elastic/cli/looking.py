"""`elastic events` and `elastic logs`: what has happened to a job, and what its workers have printed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from elastic.cli.sources import Certificate, Etcd, Job, Secret, Source, source
from elastic.errors import ElasticError
from elastic.observe.journal import shown
from elastic.observe.output import Collapse, Line

_EVERY_S = 0.25
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")]


def events(
    job: Job,
    follow: Follow = False,
    as_json: AsJson = False,
    etcd: Etcd = None,
    secret_file: Secret = None,
    etcd_ca: Certificate = None,
    etcd_cert: Certificate = None,
    etcd_key: Certificate = None,
    etcd_password_file: Certificate = None,
    tls_cert: Certificate = None,
    tls_key: Certificate = None,
    tls_ca: Certificate = None,
) -> None:
    """Shows what has happened to a job: incidents, changes of its members, messages, saves."""
    form: Callable[[dict[str, Any]], str] = json.dumps if as_json else shown
    with exits(), source(job, etcd, secret_file, (etcd_ca, etcd_cert, etcd_key, etcd_password_file), (tls_cert, tls_key, tls_ca)) as found:

        def show() -> bool:
            new = found.events()
            _print([form(event) for event in new])
            return bool(new)

        _until_over(found, show, follow=follow)


def logs(
    job: Job,
    worker: Annotated[int | None, typer.Argument(help="Only what this worker has printed.")] = None,
    follow: Follow = False,
    as_json: AsJson = False,
    every_line: Annotated[bool, typer.Option("--all", help="Show each line, not equal ones of a moment as one.")] = False,
    etcd: Etcd = None,
    secret_file: Secret = None,
    etcd_ca: Certificate = None,
    etcd_cert: Certificate = None,
    etcd_key: Certificate = None,
    etcd_password_file: Certificate = None,
    tls_cert: Certificate = None,
    tls_key: Certificate = None,
    tls_ca: Certificate = None,
) -> None:
    """Shows what workers have printed, with their numbers; equal lines of a second are one line with a count.

    With --etcd: workers of all hosts that this machine reaches. Only what Python code prints is kept.
    """
    collapse, silent = Collapse(-1.0 if every_line else 1.0), True
    with exits(), source(job, etcd, secret_file, (etcd_ca, etcd_cert, etcd_key, etcd_password_file), (tls_cert, tls_key, tls_ca)) as found:

        def show() -> bool:
            nonlocal silent
            new = found.output(worker)
            silent = silent and not new
            lines = [*collapse.add(new), *collapse.due(time.time() if follow else float("inf"))]
            _print([_line(line, as_json=as_json) for line in lines])
            return bool(new)

        _until_over(found, show, follow=follow)
        _print([_line(line, as_json=as_json) for line in collapse.due(float("inf"))])
    if worker is not None and silent:
        print(f"worker {worker} has printed nothing, or the job {job} has had no such worker: `elastic events` names all", file=sys.stderr)


def _line(line: Line, *, as_json: bool) -> str:
    if not as_json:
        return line.shown(width=5)
    stream = "stderr" if line.stream == "e" else "stdout"
    return json.dumps({"at": line.at, "workers": sorted({*line.workers}), "stream": stream, "count": line.count, "text": line.text})


def _until_over(found: Source, show: Callable[[], bool], *, follow: bool) -> None:
    """Calls `show` as long as it shows something, and with `follow` until the job has ended."""
    while True:
        over = found.over  # before the last look
        if not show() and (over or not follow):
            return
        if follow and not over:
            time.sleep(_EVERY_S)


def _print(lines: list[str]) -> None:
    if lines:
        print("\n".join(lines), flush=True)


@contextmanager
def exits() -> Generator[None]:
    """Prints an error as one line, and exits; Ctrl-C and a reader that has gone end the command quietly."""
    try:
        yield
    except ElasticError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:
        sys.stdout = None  # type: ignore[assignment]
        raise typer.Exit(0) from None
