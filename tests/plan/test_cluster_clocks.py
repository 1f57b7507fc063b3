"""Tests of `elastic plan --energy`: clocks of a cluster on paper."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from elastic.cli.main import app
from elastic.errors import PlanError
from elastic.plan.clock_files import load

CLUSTERS = Path(__file__).parents[2] / "examples" / "clusters"
KIND = {"name": "k", "usual": 2, "idle_w": 1.0, "measured": [[2, 1.0, 3.0], [1, 1.5, 2.0]]}


def planned(*words: str):
    files = ["--cluster", str(CLUSTERS / "mixed.toml"), "--workload", str(CLUSTERS / "gpt-1.3b.toml")]
    return CliRunner().invoke(app, ["plan", *files, *words])


@pytest.mark.slow
def test_a_plan_on_paper_has_a_frontier_of_seconds_and_joules():
    found = json.loads(planned("--energy", str(CLUSTERS / "clocks.toml"), "--json").output)
    frontier = found["energy"]["frontier"]
    assert len(frontier) >= 3
    assert [each["joules"] for each in frontier] == sorted((each["joules"] for each in frontier), reverse=True)
    assert [each["step_s"] for each in frontier] == sorted(each["step_s"] for each in frontier)
    assert all(len(each["clocks_mhz"]) == len(found["stages"]) for each in frontier)


@pytest.mark.long
def test_the_frontier_is_printed():
    shown = planned("--energy", str(CLUSTERS / "clocks.toml"))
    assert shown.exit_code == 0
    assert "what other clocks would give, predicted" in shown.output


def test_a_file_gives_the_clocks_by_kind(tmp_path):
    path = tmp_path / "clocks.json"
    path.write_text(json.dumps({"kinds": [KIND]}))
    assert [tuple(point) for point in load(path)["k"].points] == [(2, 1.0, 3.0), (1, 1.5, 2.0)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"usual": 3}, "must have a row of the usual setting, 3"),
        ({"measured": [[2, 1.0]]}, "must be \\[setting, seconds, watts\\]"),
        ({"measured": [[2, -1.0, 3.0]]}, "with seconds above 0"),
        ({"measured": [[2, 1.0, 3.0], [1, -1.0, 2.0]]}, "must be finite and not negative"),
        ({"idle_w": "x"}, "must be a number"),
        ({"name": ""}, "must be a name"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name(tmp_path, change, message):
    path = tmp_path / "clocks.json"
    path.write_text(json.dumps({"kinds": [{**KIND, **change}]}))
    with pytest.raises(PlanError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
