"""Tests registered objects of a user's loop: what is kept of them, and when their values match other workers'."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import elastic
from elastic.errors import JobFailed, TrainerError
from elastic.worker.loopsettings import compared
from elastic.worker.registered import LARGEST, Registered
from tests.recovery import stopping

MODEL = nn.Sequential(nn.Linear(2, 2))


class Counter:
    """Counts; `more` is what else is in its state."""

    def __init__(self, count: int = 0, **more: Any) -> None:
        self.count, self.more = count, more

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, **self.more}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.more = dict(state)
        self.count = self.more.pop("count")


class Forgetful(Counter):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        self.count += 1
        return super().state_dict()


class Strict(Counter):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise ValueError("not me")


def registered(*objects: Any) -> Registered:
    found = Registered()
    found.add(objects, MODEL)
    return found


def travelled(found: Registered) -> Any:
    return json.loads(json.dumps(found.told))


STATES: dict[str, Any] = {
    "best": math.inf,
    "last": math.nan,
    "name": "x",
    "done": False,
    "none": None,
    "seen": [1, (2, 3.5)],
    "by_epoch": {0: 0.1, "a": {"b": 1e-300}},
    "mean": torch.tensor([1.0, 2.0], dtype=torch.float64),
    "sums": np.array([[1, 2], [3, 4]]),
    "scalar": np.float32(0.1),
}


def test_states_of_plain_values_and_small_tensors_come_back() -> None:
    one, other = Counter(3, **STATES), Counter()
    found = registered(one)
    found.note(7)
    step, states = travelled(found)
    there = Registered()
    there.learn(step, states, "the others have")
    there.add((other,), MODEL)
    assert other.count == 3
    assert other.more["by_epoch"] == STATES["by_epoch"]
    assert torch.equal(other.more["mean"], STATES["mean"])
    there.begin(warns=False)
    assert json.dumps(there.told) == json.dumps([step, states])
    assert there.digest == found.digest
    there.note(8)
    found.note(8)
    assert there.digest == found.digest
    one.count = 4
    found.note(9)
    assert there.digest != found.digest


def test_they_are_loaded_when_they_are_registered_and_when_the_loop_begins_and_not_later() -> None:
    counter, other = Counter(), Counter()
    found = Registered()
    found.learn(5, [["Counter", {"dict": [["count", 9]]}], ["Counter", {"dict": [["count", 11]]}]], "the others have")
    found.add((counter,), MODEL)
    found.add((other,), MODEL)
    assert (counter.count, other.count) == (9, 11)
    counter.count = 0  # by code between two loops that have ended, which also runs here
    found.begin(warns=False)
    assert counter.count == 9
    counter.count = 10
    found.begin(warns=False)
    assert counter.count == 10
    assert travelled(found)[0] == 5, "what it was given, until a body is over here"


def test_whoever_begins_with_the_others_keeps_what_it_has() -> None:
    counter = Counter()
    found = registered(counter)
    assert found.told is None, "whoever joins before the first body is over does itself what was done to the objects"
    counter.count = 5
    found.learn(-1, None, "the others have")
    found.begin(warns=False)
    assert counter.count == 5


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (3, "is given a int, which has no state_dict"),
        (torch.optim.SGD(MODEL.parameters(), 0.1), "a SGD of the Trainer is given"),
        (MODEL[0], "a Linear of the Trainer is given"),
        (Counter(seen={1, 2}), "the state 'seen' of Counter cannot be registered: a set has no JSON form"),
        (Counter(raw=b"x"), "the state 'raw' of Counter cannot be registered: a bytes has no JSON form"),
        (Counter(odd={(1, 2): 3}), "the state 'odd' of Counter cannot be registered"),
        (Counter(big=torch.zeros(LARGEST)), "the limit is 262,144, since they are sent to every worker that joins"),
        (Forgetful(), r"its load_state_dict\(\) does not restore what"),
        (Strict(), r"its load_state_dict\(\) refuses what its state_dict\(\) returned \(ValueError: not me\)"),
    ],
)
def test_what_cannot_be_kept_is_refused(given: Any, why: str) -> None:
    with pytest.raises(TrainerError, match=why):
        registered(given)


def test_a_state_that_cannot_be_kept_any_more_ends_the_step() -> None:
    counter = Counter()
    found = registered(counter)
    with pytest.raises(TrainerError, match="is given to register_for_checkpointing twice"):
        found.add((counter,), MODEL)
    counter.more["seen"] = {1}
    with pytest.raises(TrainerError, match="the state 'seen' of Counter"):
        found.note(3)


def test_other_objects_than_the_others_have_are_refused() -> None:
    found = Registered()
    found.learn(5, [["Counter", {"dict": [["count", 9]]}]], "the other workers have")
    with pytest.warns(UserWarning, match="the other workers have the states of Counter, which are not used"):
        found.begin(warns=True)
    found.learn(5, [["Counter", {"dict": [["count", 9]]}], ["Sampler", 1]], "the other workers have")
    found.add((Counter(),), MODEL)
    with pytest.raises(TrainerError, match="have the states of Counter, Sampler, but register_for_checkpointing was given Counter here"):
        found.begin(warns=True)


def test_a_difference_is_named() -> None:
    one, other = registered(Counter(3), Counter(4)), registered(Counter(3), Counter(5, note="x" * 100))
    for each in (one, other):
        each.note(3)
    assert compared({0: one.named, 2: other.named}) == (
        "count of Counter (number 2 of those registered) is 4 on worker 0 and 5 on worker 2"
    )
    nothing = registered()
    nothing.note(3)
    assert compared({0: one.named, 1: nothing.named}) == (
        "the list of objects given to register_for_checkpointing is Counter, Counter on worker 0 and nothing on worker 1"
    )


@pytest.fixture(scope="module")
def whole() -> list[Any]:
    found = elastic.run(stopping.train, args=[True, {}, {}], workers=1).value
    assert found[0] == stopping.LAST
    assert found[2]["seen"] == stopping.LAST + 1
    return found


def died(result: Any) -> list[int]:
    return [worker for found in result.incidents if found["kind"] == "death" for worker in (found["worker"], *found["also"])]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "options"),
    [
        ({"1": 3, "0": 7, "2": 12}, {"workers": 2, "stages": 2}),
        pytest.param({"0": 3, "1": 7}, {"workers": 3, "stages": 1}, marks=pytest.mark.long),
    ],
)
def test_whoever_joins_counts_on(whole: list[Any], kills: dict[str, int], options: dict[str, Any], leftovers: Any) -> None:
    found = elastic.run(stopping.train, args=[True, kills, {}], rebalance=False, min_workers=1, **options)
    assert sorted(died(found)) == sorted(map(int, kills))
    assert found.value == whole


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"workers": 2, "stages": 2}, id="all workers are new"),
        pytest.param(
            {"workers": 3, "stages": 3, "min_workers": 1}, id="one has seen the steps that are taken again", marks=pytest.mark.long
        ),
    ],
)
def test_the_next_job_counts_on_and_so_do_workers_behind_a_checkpoint(
    whole: list[Any], tmp_path: Path, options: dict[str, Any], leftovers: Any
) -> None:
    saves = {"checkpoint": str(tmp_path / "kept"), "every": 4}
    elastic.run(stopping.train, args=[True, {}, saves, 7], workers=1)
    kills = {"0": 13, "1": 13}  # at once: no worker has all of the state, so all start from the save after step 11
    found = elastic.run(stopping.train, args=[True, kills, saves], rebalance=False, **options)
    assert sorted(died(found)) == [0, 1]
    assert found.value == whole


@pytest.mark.slow
def test_without_being_registered_it_ends_and_says_what_to_do(leftovers: Any) -> None:
    began = time.monotonic()
    with pytest.raises(JobFailed, match=r"lr of parameter group 0 is .* on worker 0 and .*register_for_checkpointing"):
        elastic.run(stopping.train, args=[False, {"1": 3}, {}], workers=2, stages=1, rebalance=False)
    assert time.monotonic() - began < 30
