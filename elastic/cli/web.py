"""`elastic top --web`: serves the page of a job until the command is ended."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from elastic.cli.sources import AskedSource, HereSource, Source
from elastic.errors import SettingsError
from elastic.host.rundir import RunDirectory
from elastic.observe.incident import headline
from elastic.observe.journal import Event, shown


def line_of(event: Event) -> str:
    """Returns an event as one line."""
    if event["kind"] == "incident":
        return shown({**event, "kind": "said", "text": headline(event["incident"])})
    return shown(event).splitlines()[0]


def _report(directory: RunDirectory) -> str:
    from elastic.observe.page import page

    try:
        return page(directory)
    except OSError as error:
        raise SettingsError(f"the report cannot be made: {error}") from error


def serve(found: Source, port: int, every: float, secret_file: Path | None) -> None:
    """Serves the page, and looks at the job every so many seconds; the last state stays there when the job has ended."""
    from elastic.launch.sharing import key_of, read_secret
    from elastic.observe.web import Acts, Board, serve

    acts = None
    if isinstance(found, AskedSource) and secret_file is not None:
        acts = Acts(key_of(read_secret(secret_file)), key_of, found.ask)
    board = Board(found, lambda event: line_of(event).partition(" ")[2].removeprefix("said "))
    server = serve(board, port, acts, partial(_report, found.directory) if isinstance(found, HereSource) else None)
    host, taken = server.server_address[:2]
    print(f"http://{host!s}:{taken}/ shows the job; Ctrl-C ends this", flush=True)
    with server:
        while board.look():
            time.sleep(every)
        print("the job has ended; the page shows its last state", flush=True)
        while True:
            time.sleep(3600)
