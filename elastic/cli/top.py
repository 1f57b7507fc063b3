"""`elastic top` and `elastic report`: how a job stands, and a page about it."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, RenderableType
from rich.live import Live

from elastic.cli.looking import AsJson, exits
from elastic.cli.sources import Certificate, Etcd, Job, Secret, Source, here, source
from elastic.cli.web import line_of, serve
from elastic.errors import SettingsError
from elastic.observe import top

_KEPT = 5
_WIDTH = 160  # where no terminal says how wide it is


def top_command(
    job: Job,
    once: Annotated[bool, typer.Option("--once", help="Print it once.")] = False,
    as_json: AsJson = False,
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1)] = 1.0,
    web: Annotated[
        int | None, typer.Option(metavar="PORT", help="Show a web page on this port of 127.0.0.1 instead; 0: a free one.", min=0, max=65535)
    ] = None,
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
    """Shows how a job stands: workers and what they do, hosts, stages, step times, memory, links, the last events.

    The page of --web can also drain hosts and end workers, for who types the job's secret; it needs --etcd for this.
    """
    files, tls = (etcd_ca, etcd_cert, etcd_key, etcd_password_file), (tls_cert, tls_key, tls_ca)
    with exits(), source(job, etcd, secret_file, files, tls) as found:
        if as_json:
            print(json.dumps(found.standing()))
        elif once or (web is None and not _redraws(Console())):
            if not once:
                print("elastic top: this output cannot be drawn anew, so the job is shown once", file=sys.stderr)
            console = Console(highlight=False, width=None if _redraws(Console()) or "COLUMNS" in os.environ else _WIDTH)
            now = None if found.over else time.time()
            console.print(top.shown(found.standing(), _recent(found, []), now=now))
        elif web is not None:
            serve(found, web, every, secret_file)
        else:
            _live(found, every)


def _redraws(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal


def _live(found: Source, every: float) -> None:
    """Shows the job until it has ended, and leaves the last state on the terminal."""
    console, events = Console(highlight=False), list[str]()
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            over = found.over
            events = _recent(found, events)
            live.update(_shown(found, events, console.height, over=over), refresh=True)
            if over:
                return
            time.sleep(every)


def _shown(found: Source, events: list[str], height: int, *, over: bool) -> RenderableType:
    try:
        return top.shown(found.standing(), events, height, now=None if over else time.time())
    except SettingsError:
        if over:
            raise
        return "the job has not begun to train yet"


def _recent(found: Source, events: list[str]) -> list[str]:
    return [*events, *(line_of(event) for event in found.events())][-_KEPT:]


def report(
    job: Annotated[str, typer.Argument(help="A job's run directory, or its name if that is a temporary one.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path("report.html"),
) -> None:
    """Writes one HTML page about a job, running or ended: loss, throughput, layout, incidents, memory."""
    with exits():
        from elastic.observe.page import write

        try:
            write(here(job), output)
        except OSError as error:
            print(f"error: {output} cannot be written: {error.strerror or error}")
            raise typer.Exit(1) from None
        print(output)
