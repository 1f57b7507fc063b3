"""The group of all `elastic` commands, each imported when it is used: so `elastic --help` and completion take no time.

Rule: the short help of a command stands in `elastic.cli.main.TABLE` too; a test compares it with the command's docstring.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One command: where its function (or its `typer.Typer`, for a group) is, and the first sentence of its help.

    `where` is `module:name`. `exit_codes`: its help ends with the table of exit codes. `settings`: its context settings.
    """

    where: str
    help: str
    exit_codes: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def load(self, name: str) -> Any:
        """Imports the command and makes it one of typer's."""
        module, _, attribute = self.where.partition(":")
        found = getattr(importlib.import_module(module), attribute)
        app = found if isinstance(found, typer.Typer) else self._alone(found)
        command = typer.main.get_command(app)
        command.name = name
        return command

    def _alone(self, function: Any) -> typer.Typer:
        from elastic.cli.exit_codes import EPILOG

        # Without markup: brackets are part of what help says, as in `[user@]host:port`.
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(epilog=EPILOG if self.exit_codes else None, context_settings=dict(self.settings))(function)
        return app


class LazyGroup(TyperGroup):
    """A group whose commands stand in `table`. A list of commands, as help and completion show it, imports none of them."""

    table: ClassVar[Mapping[str, Entry]] = {}
    _lists = False

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        entry = self.table.get(cmd_name)
        if entry is None:
            return None
        if self._lists:
            return TyperCommand(cmd_name, help=entry.help, rich_markup_mode=None)
        if cmd_name not in self.commands:
            self.commands[cmd_name] = entry.load(cmd_name)
        return self.commands[cmd_name]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Names similar commands when there is none of this name, as typer does, which looks for them in `commands`."""
        if args[0] not in self.table:
            with self._listing():
                self.commands = {name: self.get_command(ctx, name) for name in self.table}
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with self._listing():
            super().format_commands(ctx, formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        with self._listing():
            return super().shell_complete(ctx, incomplete)

    @contextmanager
    def _listing(self) -> Iterator[None]:
        self._lists = True
        try:
            yield
        finally:
            self._lists = False
