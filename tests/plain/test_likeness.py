"""Tests of when workers are compared, and of what is said if they differ. No processes run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from elastic.engine.decision import Apply
from elastic.errors import MismatchError
from elastic.worker.likeness import Likeness


def view(workers: int, micro_batches: int = 8) -> Any:
    return SimpleNamespace(workers=range(workers), workload=SimpleNamespace(micro_batches=micro_batches))


def answer(step: int, alike: Any = (), stray: str | None = None) -> Apply:
    return Apply(
        step=step, loss=0.0, denominator=1.0, norm=0.0, clip=1.0, tokens=0, stop=False, pause=False, again=False, stray=stray, alike=alike
    )


def compared(likeness: Likeness, steps: range, of: Any, worker: int = 0) -> list[int]:
    """Takes the steps. Returns those in which members were compared, all of them."""
    found = []
    for step in steps:
        if likeness.takes(step, of):
            found.append(step)
            likeness.committed(answer(step, [*of.workers]), worker)
        else:
            likeness.committed(answer(step), worker)
    return found


def test_workers_are_compared_in_the_first_step_of_two_passes_and_then_rarely() -> None:
    likeness = Likeness(lambda step: "", 1)
    for passed, wanted in enumerate([[0], [10], [], []]):
        likeness.begin(10 * (passed + 1))
        assert compared(likeness, range(10 * passed, 10 * (passed + 1)), view(4)) == wanted
    likeness.begin(2000)
    assert compared(likeness, range(40, 2000), view(4)) == [*range(510, 2000, 500)], "a thousandth of 2 micro-batches a step"


def test_one_that_joins_is_compared_in_two_passes_with_all() -> None:
    likeness, joiner = Likeness(lambda step: "", 1), Likeness(lambda step: "", 1)
    likeness.begin(10)
    assert compared(likeness, range(5), view(2)) == [0]
    joiner.begin(10)
    for each, worker in ((likeness, 0), (joiner, 2)):
        assert compared(each, range(5, 10), view(3), worker) == [5]
    for end in (20, 30):
        for each, worker in ((likeness, 0), (joiner, 2)):
            each.begin(end)
            assert compared(each, range(end - 10, end), view(3), worker) == ([10] if end == 20 else [])


def test_each_update_of_a_batch_is_compared() -> None:
    likeness = Likeness(lambda step: "", 2)
    likeness.begin(20)
    assert compared(likeness, range(20), view(2)) == [0, 1]
    likeness.begin(40)
    assert compared(likeness, range(20, 40), view(2)) == [20, 21]


def test_a_worker_that_could_not_be_compared_is_so_in_the_next_step() -> None:
    """It takes a step inside of a collective, where no body can be run."""
    able, unable = Likeness(lambda step: "", 1), Likeness(lambda step: None, 1)
    for each, worker in ((able, 0), (unable, 1)):
        each.begin(10)
        assert each.takes(0, view(3))
        each.committed(answer(0, [0, 2]), worker)
        assert each.takes(1, view(3))
        each.committed(answer(1, [0, 1, 2]), worker)
        assert not each.takes(2, view(3))
    assert unable.sampled(0) is None
    assert able.sampled(1) == (True, "")


def test_one_worker_is_compared_with_nobody() -> None:
    assert not Likeness(lambda step: "", 1).takes(0, view(1))


@pytest.mark.parametrize(
    ("compared_at", "said"), [(None, "numbers. The body"), (6, "They were equal in step 3: what has been trained since")]
)
def test_the_error_says_since_when_something_may_be_wrong(compared_at: int | None, said: str) -> None:
    likeness = Likeness(lambda step: "", 2)
    if compared_at is not None:
        likeness.committed(answer(compared_at, [0, 1]), 0)
    with pytest.raises(MismatchError, match=f"step 9 cannot be taken: worker 1 found other gradients .*{said}"):
        likeness.committed(answer(18, [0, 1], "worker 1"), 0)
