"""Tests of when workers are compared, and of what is said if they differ. No processes run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from elastic.engine.decision import Apply
from elastic.errors import MismatchError
from elastic.worker.likeness import Likeness


def view(workers: int, epoch: int = 1) -> Any:
    return SimpleNamespace(workers=range(workers), workload=SimpleNamespace(micro_batches=8), epoch=epoch)


def answer(step: int, alike: Any = (), stray: str | None = None, **more: Any) -> Apply:
    fixed = {"loss": 0.0, "denominator": 1.0, "norm": 0.0, "clip": 1.0, "tokens": 0, "stop": False, "pause": False, "again": False}
    return Apply(step=step, stray=stray, alike=tuple(alike), **fixed, **more)  # pyright: ignore[reportArgumentType]


def made(updates: int = 1, *, proven: bool = True, sample: str | None = "") -> Likeness:
    return Likeness(lambda step: sample, updates, proven=proven)


def compared(likeness: Likeness, steps: range, of: Any, worker: int = 0) -> list[int]:
    """Takes the steps of a pass. Returns those in which members were compared, all of them."""
    found = []
    for step in steps:
        if likeness.takes(step, of):
            found.append(step)
            likeness.committed(answer(step, of.workers), worker)
        else:
            likeness.committed(answer(step), worker)
    return found


def test_workers_are_compared_in_the_first_step_of_two_passes_and_then_rarely() -> None:
    """4 workers have 2 of a step's micro-batches each: 1,000 of them are 500 steps."""
    likeness = made()
    for first, end, wanted in ((0, 3, [0]), (3, 6, [3]), (6, 9, []), (9, 12, []), (12, 1600, [503, 1003, 1503])):
        likeness.begin(first)
        assert compared(likeness, range(first, end), view(4)) == wanted


def test_one_that_joins_is_compared_with_all_in_every_pass() -> None:
    likeness, joiner = made(), made(proven=False)
    likeness.begin(0)
    assert compared(likeness, range(5), view(2)) == [0]
    joiner.begin(5)
    for each, worker in ((likeness, 0), (joiner, 2)):
        assert compared(each, range(5, 10), view(3, epoch=2), worker) == [5]
    for first in (10, 13, 16):
        for each, worker in ((likeness, 0), (joiner, 2)):
            each.begin(first)
            assert compared(each, range(first, first + 3), view(3, epoch=2), worker) == [first]


def test_each_update_of_a_batch_is_compared() -> None:
    likeness = made(2)
    likeness.begin(0)
    assert compared(likeness, range(20), view(2)) == [0, 1]
    likeness.begin(10)
    assert compared(likeness, range(20, 40), view(2)) == [20, 21]


def test_a_worker_that_could_not_be_compared_is_so_in_the_next_step() -> None:
    """It takes a step inside of a collective, where no body can be run."""
    able, unable = made(), made(sample=None)
    for each, worker in ((able, 0), (unable, 1)):
        each.begin(0)
        assert each.takes(0, view(3))
        each.committed(answer(0, [0, 2]), worker)
        assert each.takes(1, view(3))
        each.committed(answer(1, [0, 1, 2]), worker)
        assert not each.takes(2, view(3))
    assert unable.sampled(0) is None
    assert able.sampled(1) == (True, "")


def test_one_worker_is_compared_with_nobody() -> None:
    assert not made().takes(0, view(1))


def test_the_user_is_warned_once_if_nobody_is_left_who_is_known_to_be_right(caplog: pytest.LogCaptureFixture) -> None:
    alone, two, other = (made(proven=False) for _ in range(3))
    assert not any(alone.takes(step, view(1)) for step in (5, 6))
    two.committed(answer(5, [3, 4], unproven=True), 3)
    other.committed(answer(5, [3, 4], unproven=True), 4)
    assert [record.message.partition(":")[0] for record in caplog.records] == 2 * [
        "no worker is left that was compared with one of the first ones"
    ]
    assert alone.sampled(7) == two.sampled(7) == other.sampled(7) == (True, "")


def test_one_that_was_compared_with_the_first_ones_is_proven() -> None:
    joiner = made(proven=False)
    assert joiner.sampled(5) == (False, "")
    joiner.committed(answer(5, [0, 2]), 2)
    assert joiner.sampled(9) == (True, "")
    assert not joiner.takes(9, view(1))


@pytest.mark.parametrize(
    ("before", "said"),
    [([], "numbers. The body"), ([0, 1], "They were equal in step 3: what has been"), ([0, 2], "numbers. The body")],
)
def test_the_error_says_since_when_something_may_be_wrong(before: list[int], said: str) -> None:
    """Worker 1 may be one that joins: nothing wrong was trained before."""
    likeness = made(2)
    likeness.committed(answer(6, before), 0)
    with pytest.raises(MismatchError, match=f"step 9 cannot be taken: worker 1 found other gradients .*{said}"):
        likeness.committed(answer(18, [0, 1], "worker 1"), 0)
