"""What workers print, in files; and how it is shown."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from elastic.errors import SettingsError
from elastic.observe.output import Collapse, KeptStream, Line, OutputFile, OutputReader, ranges


def line(at: float, worker: int, text: str) -> Line:
    return Line(at=at, text=text, stream="o", workers=(worker,))


def test_lines_are_kept_by_worker_in_the_order_of_their_times(tmp_path):
    clock = iter([1.0, 2.0, 3.0])
    first, second = (OutputFile(tmp_path / "output", worker, lambda: next(clock)) for worker in (0, 1))
    first.write("o", "half a ")
    second.write("e", "a warning\n")
    first.write("o", "line\nand an unfinished one")
    reader = OutputReader(tmp_path / "output")
    assert [(each.text, each.stream, each.workers) for each in reader.read()] == [("a warning", "e", (1,)), ("half a line", "o", (0,))]
    first.write("o", "\n")
    assert [each.text for each in reader.read()] == ["and an unfinished one"]
    assert [each.text for each in OutputReader(tmp_path / "output", worker=1).read()] == ["a warning"]


def test_a_line_without_an_end_is_kept_when_the_worker_ends(tmp_path):
    file = OutputFile(tmp_path / "output", 0)
    file.write("o", "done\n")
    file.write("e", "the last words")
    file.end()
    file.end()
    assert [each.text for each in OutputReader(tmp_path / "output").read()] == ["done", "the last words"]


def test_a_progress_bar_is_one_line(tmp_path):
    file = OutputFile(tmp_path / "output", 0)
    for part in range(2000):
        file.write("e", f"\r{part} of 2000 " + "#" * 100)
    file.write("e", "\n")
    (found,) = OutputReader(tmp_path / "output").read()
    assert found.text.startswith("1999 of 2000")


def test_a_file_that_has_grown_large_is_begun_again_and_nothing_is_read_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("elastic.observe.output._LARGEST", 100)
    file, reader = OutputFile(tmp_path / "output", 7), OutputReader(tmp_path / "output")
    seen = []
    for number in range(20):
        file.write("o", f"line {number}\n")
        seen += [each.text for each in reader.read()]
    assert seen == [f"line {number}" for number in range(20)]
    last = max(int(path.suffix[1:]) for path in (tmp_path / "output").iterdir())
    assert sorted(path.name for path in (tmp_path / "output").iterdir()) == [f"7.{last - 1}", f"7.{last}"]


def test_a_folder_that_cannot_be_made_disturbs_no_print(tmp_path):
    OutputFile(tmp_path / "missing" / "output", 0).write("o", "lost\n")


@pytest.mark.parametrize(("lead", "written"), [("", "a\nb\nc"), ("<", "<a\n<b\n<c")])
def test_a_kept_stream_writes_what_it_was_given(lead, written):
    raw, kept = io.BytesIO(), list[str]()
    stream = KeptStream(io.TextIOWrapper(raw, encoding="utf-8"), kept.append, lead)
    stream.write("a\nb\n")
    stream.write("c")
    stream.flush()
    assert raw.getvalue().decode() == written
    assert "".join(kept) == "a\nb\nc"


def test_equal_lines_of_a_moment_are_one_line_with_a_count():
    collapse = Collapse(window_s=1.0)
    lines = [line(0.0, 0, "w"), line(0.1, 1, "w"), line(0.2, 0, "other"), line(0.3, 2, "w"), line(5.0, 0, "w")]
    shown = [each.shown() for each in [*collapse.add(lines), *collapse.due(float("inf"))]]
    assert shown == ["[0-2] w (3 times)", "[0] other", "[0] w"]


def test_ranges():
    assert ranges([3, 0, 1, 2, 5, 7, 8]) == "0-3 5 7-8"


def test_output_of_another_user_is_refused_and_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic.observe.output.os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(SettingsError, match="can only be read by the user whose job it is"):
        OutputReader(tmp_path).read()
