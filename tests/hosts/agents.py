"""Several hosts on one machine: agents with an etcd of their own, which share nothing but that etcd, TCP connections and a secret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.etcd_access import etcd_with

SCRIPT = Path(__file__).parent / "script.py"
ROOT = Path(__file__).parents[2]
_END_S = 60.0


@dataclass
class Host:
    """One run of `elastic agent`, with a run directory of its own."""

    process: subprocess.Popen[str]
    directory: Path
    out: Path
    err: Path

    def result(self, seconds: float = _END_S) -> Any:
        """The job's value, as it was printed. Raises AssertionError if the agent has failed."""
        code = self.process.wait(seconds)
        assert code == 0, self.said
        return json.loads(self.out.read_text().splitlines()[-1])

    def failure(self, code: int | None = None) -> str:
        """What the agent said when it failed, with this exit code, by default with any of an error."""
        assert self.process.wait(_END_S) in ((1, 2, 3, 75) if code is None else (code,)), self.said
        return self.said

    @property
    def said(self) -> str:
        return self.err.read_text()

    @property
    def incidents(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "incidents.jsonl").read_text().splitlines()]

    def has_members(self) -> None:
        """Waits until its workers are members, and a moment longer."""
        deadline = time.monotonic() + _END_S
        while not (self.directory / "members.json").exists():
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)
        time.sleep(1.0)

    def until(self, text: str) -> None:
        """Waits until the agent has said this."""
        deadline = time.monotonic() + _END_S
        while text not in self.said:
            assert time.monotonic() < deadline, self.said
            assert self.process.poll() is None, self.said
            time.sleep(0.02)


@dataclass
class Cluster:
    """Starts hosts that take part in the job `job`."""

    folder: Path
    etcd: str
    started: list[Host] = field(default_factory=list)

    def secret(self, text: str = "a secret of thirty-two letters...") -> Path:
        path = self.folder / f"secret-{len(text)}"
        path.write_text(text)
        path.chmod(0o600)
        return path

    def host(
        self,
        *args: Any,
        workers: int = 2,
        secret: Path | None = None,
        target: str = f"{SCRIPT}:train",
        within: Sequence[str] = (),
        **options: Any,
    ) -> Host:
        """Starts `elastic agent`; options with `_` for `-`, and True for one without a value. `within` are words before the command."""
        name = f"host-{len(self.started)}"
        directory, out, err = self.folder / name, self.folder / f"{name}.out", self.folder / f"{name}.err"
        flags = {
            "etcd": self.etcd,
            "job": "job",
            "workers": workers,
            "secret-file": secret or self.secret(),
            "directory": directory,
            **options,
        }
        given = ((f"--{flag.replace('_', '-')}", value) for flag, value in flags.items())
        flat = [text for flag, value in given for text in ((flag,) if value is True else (flag, str(value)))]
        command = [*within, sys.executable, "-m", "elastic.cli.main", "agent", *flat, target, *(json.dumps(each) for each in args)]
        with out.open("w") as stdout, err.open("w") as stderr:
            process = subprocess.Popen(
                command, stdout=stdout, stderr=stderr, stdin=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
            )
        host = Host(process, directory, out, err)
        self.started.append(host)
        return host


@contextmanager
def cluster(folder: Path, etcd: str | None = None) -> Iterator[Cluster]:
    """A cluster without hosts, by default with an etcd of its own; hosts that are started are ended at last."""
    folder.mkdir(exist_ok=True)
    with nullcontext() if etcd is not None else etcd_with(folder / "etcd") as own:
        made = Cluster(folder, etcd or str(own.endpoint() if own is not None else ""))
        try:
            yield made
        finally:
            for host in made.started:
                host.process.kill()
                host.process.wait()
