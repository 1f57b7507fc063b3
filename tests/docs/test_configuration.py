"""The configuration reference is what the code says."""

from __future__ import annotations

import inspect

import pytest

import elastic
from tests.docs.configuration import FILE, VARIABLES, described, own_variables, written


def test_it_is_up_to_date() -> None:
    assert FILE.read_text() == written(), "run `python -m tests.docs.configuration`"


@pytest.mark.parametrize("function", [elastic.run, elastic.Trainer, elastic.Job.prepare], ids=["run", "Trainer", "prepare"])
def test_every_argument_is_described(function: object) -> None:
    named = [name for names, says in described(inspect.getdoc(function) or "") for name in names if says]
    assert sorted(named) == sorted(set(inspect.signature(function).parameters) - {"self"})  # pyright: ignore[reportArgumentType]


def test_every_variable_of_the_environment_is_described() -> None:
    assert own_variables() - {"ELASTIC_JOB"} == {name for name in VARIABLES if name.startswith("ELASTIC_")}
