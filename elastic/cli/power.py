"""`elastic power-daemon`: sets GPU clocks for jobs of users who may not."""

from __future__ import annotations

import pwd
import sys
from pathlib import Path
from typing import Annotated

import typer

from elastic.errors import ElasticError, SettingsError
from elastic.settings import clocks_directory, power_socket


def power_daemon(
    user: Annotated[list[str], typer.Option(help="A user, by name or number, whose jobs may set clocks. Repeatable.")],
    gpu: Annotated[list[str] | None, typer.Option(help="The UUID of a GPU whose clock may be set; by default all. Repeatable.")] = None,
    socket: Annotated[Path | None, typer.Option(help="Listen here; by default /run/elastic-power.sock.")] = None,
) -> None:
    """Lets named users lock the clocks of named GPUs, and restores them when their jobs end. Run it as root."""
    from elastic.power import daemon

    try:
        daemon.run(socket or power_socket(), gpu or [], [_number(name) for name in user], clocks_directory())
    except ElasticError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def _number(user: str) -> int:
    if user.isdigit():
        return int(user)
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise SettingsError(f"--user {user!r}: there is no such user on this host") from None
