"""What workers print, kept in files besides: for each worker the files `WORKER.0`, `WORKER.1`, ... in the folder `output` of the run
directory. A new one begins when the last has 64 MB, and then only the last two are kept.

A line of the file is `SECONDS<tab>o|e<tab>TEXT`: the time of day, the stream, and what was printed. Only what Python code prints is kept,
not what C code or other processes write to the same terminal.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from elastic.errors import SettingsError

_LARGEST = 64 << 20  # bytes of a file


class OutputFile:
    """The output of one worker. The file is made with the first line; a line that cannot be written is dropped."""

    def __init__(self, folder: Path, worker: int, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._worker, self._clock = folder, worker, clock
        self._file, self._size, self._number = -1, 0, 0
        self._begun = {"o": "", "e": ""}

    def write(self, stream: str, text: str) -> None:
        """Writes the complete lines of what was printed so far to the stream, "o" or "e". Of a line that is printed over, as a progress bar
        is, the last content counts."""
        *lines, self._begun[stream] = (self._begun[stream] + text).split("\n")
        if len(self._begun[stream]) > io.DEFAULT_BUFFER_SIZE:
            self._begun[stream] = self._begun[stream].rpartition("\r")[2]
        kept = [line.rstrip("\r").rpartition("\r")[2] for line in lines]
        if kept:
            now = self._clock()
            self._append("".join(f"{now:.3f}\t{stream}\t{line}\n" for line in kept).encode(errors="replace"))

    def end(self) -> None:
        """Writes the lines that were begun, at the end of train_fn."""
        for stream, text in self._begun.items():
            if text.rpartition("\r")[2]:
                self.write(stream, "\n")

    def _append(self, data: bytes) -> None:
        with suppress(OSError):
            if self._file < 0 or self._size > _LARGEST:
                self._open()
            self._size += os.write(self._file, data)

    def _open(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file, self._number = -1, self._number + 1
            (self._folder / f"{self._worker}.{self._number - 2}").unlink(missing_ok=True)
        self._folder.mkdir(0o700, exist_ok=True)
        path = self._folder / f"{self._worker}.{self._number}"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self._size = 0


class KeptStream(io.TextIOWrapper):
    """A text stream whose text is also kept. `lead` is written before each line: what clears a progress bar."""

    def __init__(self, stream: io.TextIOWrapper, kept: Callable[[str], None], lead: str = "") -> None:
        super().__init__(stream.buffer, encoding=stream.encoding, errors=stream.errors, line_buffering=True)
        self._stream, self._kept = stream, kept  # closing the stream would close the buffer
        self._lead, self._at_start = lead, True

    def write(self, text: str, /) -> int:
        if self._lead and text:
            written = text.replace("\n", "\n" + self._lead, text.count("\n") - text.endswith("\n"))
            super().write((self._lead if self._at_start else "") + written)
            self._at_start = text.endswith("\n")
        else:
            super().write(text)
        self._kept(text)
        return len(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line that was printed by `workers`, `count` times in all; `at` is the time of day of the first."""

    at: float
    text: str
    stream: str
    workers: tuple[int, ...]
    count: int = 1

    def shown(self, width: int = 0) -> str:
        """Formats the line, such as `[0-3] a warning (4 times)`; `width` pads what is in brackets."""
        times = f" ({self.count} times)" if self.count > 1 else ""
        return f"{'[' + ranges(self.workers) + ']':<{width}} {self.text}{times}"


def ranges(numbers: Iterable[int]) -> str:
    """Formats numbers such as `0-3 5`."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and found[-1][1] + 1 == number:
            found[-1][1] = number
        else:
            found.append([number, number])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


class OutputReader:
    """Reads the output of a job repeatedly. `read` returns the new lines of all workers, or of one, in the order of their times.

    It begins behind the `places` of an earlier reader: offsets by the names of files. It reads at most `most` bytes of each file at a time.
    """

    def __init__(self, folder: Path, worker: int | None = None, places: Mapping[str, int] | None = None, most: int = -1) -> None:
        self._folder, self._worker, self._most = folder, worker, most
        self.places: dict[str, int] = dict(places or {})

    def read(self) -> list[Line]:
        lines: list[Line] = []
        for path in self._paths():
            with suppress(OSError):
                lines += self._new(path, int(path.stem))
        return sorted(lines, key=lambda line: line.at)

    def _paths(self) -> list[Path]:
        """Raises SettingsError if the folder is another user's."""
        if self._folder.is_dir() and not os.access(self._folder, os.R_OK | os.X_OK):
            raise SettingsError(f"{self._folder}: what workers print can only be read by the user whose job it is")
        with suppress(OSError):
            paths = sorted(path for path in self._folder.iterdir() if path.stem.isdigit() and path.suffix[1:].isdigit())
            return [path for path in paths if self._worker is None or int(path.stem) == self._worker]
        return []

    def _new(self, path: Path, worker: int) -> Iterator[Line]:
        with path.open("rb") as file:
            offset = self.places.get(path.name, 0)
            file.seek(offset)
            data = file.read(self._most)
        end = data.rfind(b"\n") + 1
        self.places[path.name] = offset + end
        for line in data[:end].decode(errors="replace").split("\n")[:-1]:
            at, _, rest = line.partition("\t")
            stream, _, text = rest.partition("\t")
            with suppress(ValueError):
                yield Line(at=float(at), text=text, stream=stream, workers=(worker,))


class Collapse:
    """Joins equal lines that are printed within `window_s`, by any workers, to one line with the number of times."""

    def __init__(self, window_s: float = 1.0) -> None:
        self._window_s = window_s
        self._open: dict[tuple[str, str], Line] = {}

    def add(self, lines: Iterable[Line]) -> Iterator[Line]:
        """Takes lines in the order of their times, and yields those that are complete."""
        for line in lines:
            yield from self.due(line.at)
            key = line.stream, line.text
            known = self._open.get(key)
            if known is not None:
                line = Line(at=known.at, text=line.text, stream=line.stream, workers=(*known.workers, *line.workers), count=known.count + 1)
            self._open[key] = line

    def due(self, now: float) -> Iterator[Line]:
        """Yields the lines that began long enough before `now`."""
        while self._open:
            key, line = next(iter(self._open.items()))
            if now - line.at < self._window_s:
                return
            del self._open[key]
            yield line
