"""Tests which worker replaces one that dies before the job is founded."""

from __future__ import annotations

from typing import Any

import pytest

from elastic.agent.founders import Founders, hindrance
from elastic.agent.supervision import WorkerProcess


def worker(number: int, **change: Any) -> WorkerProcess:
    made = WorkerProcess(number=number, pid=70 + number)
    for name, value in change.items():
        setattr(made, name, value)
    return made


def test_numbers_are_never_used_again_and_somebody_always_measures() -> None:
    founders = Founders.of(range(3)).without(0)
    assert (founders.numbers, founders.first, founders.deaths) == ((1, 2, 3), 3, 1)
    founders = founders.without(2).without(3)
    assert (founders.numbers, founders.first, founders.deaths) == ((1, 4, 5), 5, 3)


def test_up_to_as_many_as_may_fail_to_join() -> None:
    founders, others = Founders.of(range(2)), [worker(0)]
    assert hindrance(founders, worker(1), others, respawn=True) is None
    assert hindrance(founders.without(1), worker(2), others, respawn=True) is None
    assert "no more are started" in (hindrance(founders.without(1).without(2), worker(3), others, respawn=True) or "")
    assert "respawn is off" in (hindrance(founders, worker(1), others, respawn=False) or "")


@pytest.mark.parametrize(("dead", "other"), [({"step": 4}, {}), ({}, {"result": {"value": 1}})])
def test_without_a_trainer_nobody_takes_a_place(dead: dict[str, Any], other: dict[str, Any]) -> None:
    assert hindrance(Founders.of(range(2)), worker(1, **dead), [worker(0, **other)], respawn=True) == ""
