"""Tests that printing a message cannot block or end the process that prints it."""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path

import pytest

from elastic.host.rundir import RunDirectory
from elastic.observe import activity
from elastic.observe.activity import Activity
from elastic.observe.console import Console

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_sentences_come_in_order() -> None:
    stream = io.StringIO()
    console = Console(stream)
    for number in range(3):
        console.say(f"sentence {number}")
    console.drain()
    assert stream.getvalue() == "elastic: sentence 0\nelastic: sentence 1\nelastic: sentence 2\n"


def test_characters_that_the_stream_cannot_show_are_replaced() -> None:
    raw = io.BytesIO()
    console = Console(io.TextIOWrapper(raw, encoding="ascii"))
    console.say("caf\u00e9 \u2026")
    console.drain()
    assert raw.getvalue() == b"elastic: caf? ?\n"


def test_a_pipe_whose_reader_left_and_a_closed_stream() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    gone = os.fdopen(writer, "w")
    console = Console(gone)
    console.say("nobody reads this")
    console.drain()
    with pytest.raises(BrokenPipeError):
        gone.close()
    console.say("nor this")
    console.drain()


def test_a_full_disk() -> None:
    with open("/dev/full", "w") as full:
        console = Console(full)
        console.say("no room")
        console.drain()
        with pytest.raises(OSError, match="No space left"):
            full.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


def test_no_stderr_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    console = Console()
    console.say("nowhere")
    console.drain()


def test_a_reader_that_does_not_read_holds_nobody_up() -> None:
    """Not even where far more is said than a pipe takes."""
    reader, writer = os.pipe()
    console = Console(os.fdopen(writer, "w"))
    done = threading.Event()

    def say() -> None:
        for _ in range(3000):
            console.say("x" * 1000)
        console.drain(0.05)
        done.set()

    threading.Thread(target=say, daemon=True).start()
    assert done.wait(10)
    os.close(reader)


@pytest.mark.parametrize("how", ["deleted", "full", "a file"])
def test_a_run_directory_that_takes_nothing(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members are written or not; a worker that starts there is only not seen, or makes the folder anew."""
    directory = RunDirectory(tmp_path / "run")
    if how == "a file":
        directory.path.write_text("no directory")
    elif how == "full":
        directory.path.mkdir()
        monkeypatch.setattr(Path, "open", _no_room)
    directory.write_members({"epoch": 1})
    mine = Activity(directory.path, 3)
    mine.enter("forward", 5, 1, 2)
    monkeypatch.undo()
    found = activity.read(directory.path, 3)
    assert (found is not None) == (how == "deleted")
    assert found is None or (found.phase, found.step) == ("forward", 5)
    mine.close()


def _no_room(*_: object, **__: object) -> int:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("content", [b"", b"short", bytes(range(64)), b"\xff" * 64])
def test_what_is_no_activity_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "activity").mkdir()
    (tmp_path / "activity" / "1").write_bytes(content)
    assert activity.read(tmp_path, 1) is None
