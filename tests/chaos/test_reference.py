"""Tests when the undisturbed run is made again, and what is taken of it."""

from __future__ import annotations

from collections.abc import Iterator
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
