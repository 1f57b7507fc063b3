"""Metrics of steps, written to a file exactly once even if workers die: all workers send them to the agent, which writes the first copy.

If loops wrote them `if report.leader`, a line would be lost if the leader dies in the body before writing it, and written twice if it dies
afterwards and another worker leads before it is given the step.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from elastic.errors import TrainerError

_UNWRITTEN = 1024 * 1024  # bytes kept for a file that cannot be written


class Numbers:
    """Numbers the records that one worker logs in the body of a step: all workers log the same ones, so the agent can drop duplicates."""

    def __init__(self) -> None:
        self._step, self._count = -1, 0

    def record(self, path: str | os.PathLike[str], step: int, values: dict[str, Any]) -> dict[str, Any]:
        """Returns the message for the agent. Raises TrainerError for values without a JSON form."""
        self._count = self._count + 1 if step == self._step else 0
        self._step = step
        try:
            line = json.dumps({"step": step} | values | {"step": step})
        except (TypeError, ValueError) as error:
            raise TrainerError(
                f"log() cannot write the values of step {step}: {error}. Give numbers, strings, lists and dicts, such as tensor.item()"
            ) from error
        return {"type": "log", "path": os.path.realpath(path), "step": step, "number": self._count, "line": line}


class MetricFiles:
    """The metric files that an agent writes for its workers. A file that cannot be written ends nothing: `say` gets a sentence."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._files: dict[str, _File] = {}
        self._say = say

    def heard(self, message: dict[str, Any]) -> None:
        """Writes a record unless this one or a later one was received before: all workers send them in the same order."""
        path, at = message["path"], (message["step"], message["number"])
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = _File(Path(path))
        if at > file.newest:
            file.newest = at
            complaint = file.write(message["line"])
            if complaint is not None:
                self._say(f"{path} cannot be written ({complaint}): the values that step {at[0]} and later ones log are kept until it can")

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()


class _File:
    def __init__(self, path: Path) -> None:
        self.newest = (-1, -1)
        self._path, self._descriptor = path, -1
        self._unwritten = b""
        self._complained = False

    def write(self, line: str) -> str | None:
        """Appends the line, after earlier ones that could not be written. Returns the first of successive errors, else None."""
        self._unwritten += line.encode() + b"\n"
        if len(self._unwritten) > _UNWRITTEN:
            self._unwritten = self._unwritten[self._unwritten.index(b"\n") + 1 :]
        try:
            if self._descriptor < 0:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                _prune(self._path, self.newest[0])
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._descriptor, self._unwritten) :]
        except OSError as error:
            complained, self._complained = self._complained, True
            return None if complained else error.strerror or str(error)
        self._complained = False
        return None

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


def _prune(path: Path, first: int) -> None:
    """Removes an earlier job's lines of steps that this one takes again, from `first` on, and an unfinished line."""
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return
    if not regular:
        return
    text = path.read_bytes()
    kept = b"".join(line for line in text.splitlines(keepends=True) if line.endswith(b"\n") and not _is_of(line, first))
    if kept != text:
        new = path.with_name(f"{path.name}.new")
        new.write_bytes(kept)
        shutil.copymode(path, new)
        new.replace(path)


def _is_of(line: bytes, first: int) -> bool:
    with suppress(ValueError):
        record = json.loads(line)
        return isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] >= first
    return False
