"""What the program that starts a job wants to see of it: callbacks, loggers, a progress bar, metrics, a trace, a report."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from elastic.errors import ElasticError, SettingsError
from elastic.host.rundir import RunDirectory
from elastic.launch.callbacks import Audience, Called, Listener
from elastic.observe.console import say

_METHODS = ("on_step", "on_incident", "on_layout")
Port = int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Seeing:
    """The arguments of `run` of these names. `progress` None: a bar if stderr is a terminal. `shared`: the job may have several hosts.
    Raises SettingsError for wrong ones."""

    callbacks: Sequence[Any] = ()
    log: str | Sequence[str] = ()
    progress: bool | None = None
    metrics_port: Port | None = None
    trace: str | os.PathLike[str] | None = None
    report: str | os.PathLike[str] | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        for callback in self.callbacks:
            if isinstance(callback, type) or not any(hasattr(callback, name) for name in _METHODS):
                raise SettingsError(
                    f"callbacks=[{callback!r}]: a callback is an object with some of the methods {', '.join(_METHODS)}, such as an "
                    "instance of a subclass of elastic.Callback"
                )
        if self.metrics_port is not None:
            address_of(self.metrics_port)

    @property
    def bar(self) -> bool:
        """Whether a progress bar is shown."""
        if self.progress is not None:
            return self.progress
        from elastic.launch.bar import on_terminal  # imports rich

        return on_terminal()

    @property
    def watches(self) -> bool:
        """Whether the agent has to tell what happens."""
        return bool(self.callbacks or self.log or self.metrics_port is not None or self.bar)

    @contextmanager
    def opened(self, job: str, directory: RunDirectory) -> Generator[Audience]:
        """Begins to watch a job that starts now; afterwards writes trace and report. Raises SettingsError before the job starts."""
        self._check_files()
        audience = Audience(self._listeners(job))
        try:
            yield audience
        finally:
            audience.close()
            self._write(job, directory)

    def _check_files(self) -> None:
        for name in ("trace", "report"):
            if (path := getattr(self, name)) is None:
                continue
            file = Path(path).absolute()
            if not file.parent.is_dir():
                raise SettingsError(f"{name}={os.fspath(path)!r}: there is no directory {file.parent}")
            if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
                raise SettingsError(f"{name}={os.fspath(path)!r}: this user cannot write such a file")

    def _listeners(self, job: str) -> list[tuple[str, Listener]]:
        found: list[tuple[str, Listener]] = []
        logs = [self.log] if isinstance(self.log, str) else self.log
        if logs:
            from elastic.launch.loggers import Lazy, check, logger_of

            for log in logs:
                check(log)
                make = partial(logger_of, log, job)
                found.append((f"the logger {log}", Lazy(make) if self.shared else Called(make())))
        found += [(f"the callback {type(callback).__name__}", Called(callback)) for callback in self.callbacks]
        if self.metrics_port is not None:
            found.append(("the metrics", self._metrics(job)))
        if self.bar:
            from elastic.launch.bar import Bar

            found.append(("the progress bar", Bar()))
        return found

    def _metrics(self, job: str) -> Listener:
        try:
            from elastic.observe.metrics import Metrics
        except ImportError as error:
            raise SettingsError(
                f"metrics_port={self.metrics_port!r} needs the package prometheus-client, which cannot be imported ({error}): "
                "pip install prometheus-client, or leave it out"
            ) from error
        metrics = Metrics(job)
        address, port = address_of(self.metrics_port or 0)
        port = metrics.serve(address, port)
        say(f"metrics at http://{address}:{port}/metrics")
        return metrics

    def _write(self, job: str, directory: RunDirectory) -> None:
        """Writes the files. What fails is reported: the job's own outcome counts."""
        if self.trace is not None:
            from elastic.observe.trace import write as write_trace

            _tried("trace", lambda path: write_trace(directory, path), self.trace)
        if self.report is not None:
            from elastic.observe.page import write as write_report

            _tried("report", lambda path: write_report(directory, path, job), self.report)


def _tried(what: str, write: Callable[[Path], object], path: str | os.PathLike[str]) -> None:
    try:
        write(Path(path))
    except (OSError, ElasticError, ValueError, KeyError) as error:
        say(f"the {what} {os.fspath(path)} could not be written: {type(error).__name__}: {error}")


def address_of(port: Port) -> tuple[str, int]:
    """Returns address and port of `metrics_port`: a port of this host's loopback interface, or a text such as `0.0.0.0:9400`."""
    address, _, number = str(port).rpartition(":")
    if isinstance(port, bool) or not number.isdigit() or not 0 <= int(number) < 1 << 16:
        raise SettingsError(f"metrics_port={port!r}: use a port, or ADDRESS:PORT; 0 takes a free port")
    return address.strip("[]") or "127.0.0.1", int(number)
