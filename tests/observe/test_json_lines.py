"""Tests files of JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

from elastic.observe.json_lines import append_lines, read_lines


def test_several_lines_are_one_write(tmp_path: Path) -> None:
    path = tmp_path / "faults.jsonl"
    append_lines(path, [{"a": 1}, {"b": None}])
    append_lines(path, [{"c": [2]}])
    assert read_lines(path) == [{"a": 1}, {"b": None}, {"c": [2]}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == read_lines(path)
