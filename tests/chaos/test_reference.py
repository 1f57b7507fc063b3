"""Tests when the undisturbed run is made again, and what is taken of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from elastic.chaos import reference
from elastic.chaos.evidence import Reference
from elastic.chaos.schedule import JobSpec

JOB, STEPS = JobSpec(script="train:train"), 3


def run(*losses: float) -> Reference:
    return Reference(losses=losses, grad_norms=losses, digests={STEPS: f"{losses}"})


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Reference]]:
    """The runs that will be made; one that is made too many fails."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(reference, "_made_alike", set())
    runs: list[Reference] = []
    monkeypatch.setattr(reference, "_made", lambda *_: runs.pop(0))
    yield runs
    assert runs == [], "a run was not made"


def test_a_run_that_is_the_same_again_is_not_made_a_third_time(made: list[Reference]):
    made += [run(3.0, 2.0, 1.0)]
    for _ in range(3):
        assert reference.made_again(JOB, STEPS, run(3.0, 2.0, 1.0)) == run(3.0, 2.0, 1.0)


def test_a_kept_run_that_is_out_of_date_is_replaced(made: list[Reference]):
    made += [run(3.0, 2.0, 0.5), run(3.0, 2.0, 0.5)]
    assert reference.made_again(JOB, STEPS, run(3.0, 2.0, 1.0)) == run(3.0, 2.0, 0.5)
    assert reference.reference(JOB, STEPS) == run(3.0, 2.0, 0.5)


def test_a_script_that_differs_each_time_is_not_repeatable(made: list[Reference]):
    made += [run(3.0, 2.0, 0.5), run(3.0, 2.0, 0.6)]
    assert not reference.made_again(JOB, STEPS, run(3.0, 2.0, 1.0)).repeatable


def test_a_run_that_may_have_more_steps_is_made_again_to_see_its_end(made: list[Reference]):
    made += [run(3.0, 2.0, 1.0), replace(run(3.0, 2.0, 1.0), whole=True)]
    assert not reference.reference(JOB, STEPS).whole
    for _ in range(2):
        assert reference.reference(JOB, STEPS, further=True).whole


def test_without_a_place_to_keep_it_a_run_is_made_each_time(made: list[Reference], monkeypatch: pytest.MonkeyPatch):
    made += [run(3.0, 2.0, 1.0), run(3.0, 2.0, 1.0)]
    said = list[str]()
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nobody")
    for _ in range(2):
        assert reference.reference(JOB, STEPS, said.append).losses == (3.0, 2.0, 1.0)
    assert "cannot be kept in /proc/nobody/elastic-chaos (No such file or directory)" in said[1]


def test_a_user_without_a_home_keeps_nothing(monkeypatch: pytest.MonkeyPatch):
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert reference.read(reference.path_of(JOB)) is None


@pytest.mark.parametrize("data", [[], {"form": 1, "schedule": {}}, {"form": 1, "losses": ["a"], "grad_norms": [], "digests": {}}])
def test_another_file_has_no_undisturbed_run(tmp_path: Path, data: object):
    (tmp_path / "r.json").write_text(json.dumps(data))
    assert reference.read(tmp_path / "r.json") is None
