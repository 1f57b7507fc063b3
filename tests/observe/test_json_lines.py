"""Tests files of JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from elastic.observe.json_lines import append_lines, read_lines
from tests.conftest import no_file_may_have_more_than


def test_several_lines_are_one_write(tmp_path: Path) -> None:
    path = tmp_path / "faults.jsonl"
    append_lines(path, [{"a": 1}, {"b": None}])
    append_lines(path, [{"c": [2]}])
    assert read_lines(path) == [{"a": 1}, {"b": None}, {"c": [2]}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == read_lines(path)


@pytest.mark.parametrize("room", [0, 1, 10, 19])
def test_lines_for_which_there_is_no_room_leave_no_part_of_a_line(tmp_path: Path, room: int) -> None:
    path = tmp_path / "incidents.jsonl"
    append_lines(path, [{"a": 1}])
    with no_file_may_have_more_than(path.stat().st_size + room), pytest.raises(OSError, match="too large"):
        append_lines(path, [{"b": 2}, {"c": 34567}])
    append_lines(path, [{"d": 4}])
    assert read_lines(path) == [{"a": 1}, {"d": 4}]
