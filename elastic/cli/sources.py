"""Where the commands that look at a job get what they show: the run directory of a job on this host, or a job of several hosts."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from elastic.cli.asker import Asker
from elastic.errors import JobFailed, SettingsError
from elastic.host.rundir import RunDirectory
from elastic.observe import jobs
from elastic.observe.journal import LinesReader
from elastic.observe.output import Line, OutputReader

Job = Annotated[str, typer.Argument(help="A job's run directory, or its name if that is a temporary one; with --etcd its name.")]
Etcd = Annotated[str | None, typer.Option(help="Ask a job of several hosts, as `elastic status` does.")]
Secret = Annotated[Path | None, typer.Option(help="A file with the job's secret, with --etcd.")]
Certificate = Annotated[Path | None, typer.Option(help="As for `elastic agent`.")]


class Source(Protocol):
    """What is known of one job. `over`: it has ended, and nothing is added any more."""

    @property
    def over(self) -> bool: ...
    def events(self) -> list[dict[str, Any]]:
        """Returns the events that were not returned before."""
        ...

    def output(self, worker: int | None) -> list[Line]:
        """Returns the printed lines that were not returned before."""
        ...

    def standing(self) -> dict[str, Any]:
        """Returns how the job stands. Raises SettingsError if it has not begun to train."""
        ...


class HereSource:
    """A job in a run directory of this host."""

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self._events = LinesReader(directory.events)
        self._output: OutputReader | None = None

    @property
    def over(self) -> bool:
        return not self.directory.running

    def events(self) -> list[dict[str, Any]]:
        return self._events.read()

    def output(self, worker: int | None) -> list[Line]:
        self._output = self._output or OutputReader(self.directory.output, worker)
        return self._output.read()

    def standing(self) -> dict[str, Any]:
        try:
            return json.loads(self.directory.live.read_text())
        except (OSError, ValueError):
            raise SettingsError(
                f"{self.directory.path}: no job has begun to train here, or another host coordinates it: ask that one, with --etcd and "
                "--secret-file"
            ) from None


class AskedSource:
    """A job of several hosts, of which the coordinator is asked, and each host for what its workers have printed."""

    def __init__(self, asker: Asker) -> None:
        self._asker = asker
        self._after, self.over = 0, False
        self._places: dict[str, dict[str, int]] = {}  # of each agent

    def events(self) -> list[dict[str, Any]]:
        told = self._ask({"what": "events", "after": self._after}, {"events": [], "next": self._after})
        self._after = told["next"]
        return told["events"]

    def output(self, worker: int | None) -> list[Line]:
        agents = self._ask({"what": "agents"}, {"agents": {}})["agents"]
        found = []
        for agent, address in agents.items():
            after = self._places.get(agent, {})
            with suppress(JobFailed, SettingsError):  # it has just left, or cannot be reached from here
                told = self._asker.ask({"what": "output", "worker": worker, "after": after, "of": [agent, address]})
                self._places[agent] = told["next"]
                found += [Line(at=at, workers=(number,), stream=stream, text=text) for at, number, stream, text in told["lines"]]
        return sorted(found, key=lambda line: line.at)

    def standing(self) -> dict[str, Any]:
        return self._asker.ask({"what": "top"})

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Returns the coordinator's answer. Raises SettingsError if it refuses, JobFailed without an answer."""
        return self._asker.ask(request)

    def _ask(self, request: dict[str, Any], nothing: dict[str, Any]) -> dict[str, Any]:
        first = self._after == 0 and not self._places
        try:
            return self._asker.ask(request)
        except (JobFailed, SettingsError):
            if first:
                raise
            self.over = True  # the job has ended, or another agent coordinates it
            return nothing


def here(job: str) -> RunDirectory:
    """Finds the run directory of a job on this host; says on stderr if it is the newest of several. Raises SettingsError."""
    return jobs.find(job, lambda sentence: print(sentence, file=sys.stderr, flush=True))


@contextmanager
def source(
    job: str, etcd: str | None, secret_file: Path | None, files: tuple[Path | None, ...], tls: tuple[Path | None, ...]
) -> Generator[Source]:
    """Finds a job. Raises SettingsError."""
    if etcd is None:
        yield HereSource(here(job))
        return
    if secret_file is None:
        raise SettingsError("--etcd is for a job of several hosts: give its --secret-file too")
    with Asker(job, etcd, secret_file, files, tls) as asker:
        yield AskedSource(asker)
