"""What `elastic run` and `elastic agent` share: a job that runs, and its result on the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

import elastic
from elastic.cli.plan import argument
from elastic.script.target import is_whole

Log = Annotated[
    list[str] | None,
    typer.Option(help="Write metrics of steps: tensorboard:DIR, wandb:PROJECT[/RUN], mlflow:[URI#]EXPERIMENT, otel:SERVICE."),
]
Progress = Annotated[bool | None, typer.Option(help="A progress bar on stderr; by default if that is a terminal.")]
MetricsPort = Annotated[str | None, typer.Option(help="Answer Prometheus at this port of 127.0.0.1, or at ADDRESS:PORT; 0: a free one.")]
Trace = Annotated[Path | None, typer.Option(help="Write what each worker did when into this file, for ui.perfetto.dev.")]
Report = Annotated[Path | None, typer.Option(help="Write a page about the run into this HTML file when it ends.")]


def printed(target: str, args: list[str] | None, more: Callable[[], dict[str, Any]] = dict, **options: Any) -> None:
    """Runs the job, prints the leader's return value as JSON, and exits with the job's code.

    `more` returns further options; it may raise an ElasticError.
    """
    with suppress(FileNotFoundError):  # `elastic.run` reports the error
        sys.path.insert(0, str(Path.cwd()))
    try:
        given = list(args or []) if is_whole(target) else [argument(text) for text in args or []]  # a script reads its own arguments
        result = elastic.run(target, args=given, **options, **more())
    except elastic.errors.ElasticError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if result.value is not None:
        print(json.dumps(result.value))
    if result.stopped:
        raise typer.Exit(130)
