from __future__ import annotations

from elastic.membership.revisions import Revisions


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_revision_that_goes_back_is_noticed_for_a_while() -> None:
    clock = Clock()
    revisions = Revisions(clock)
    revisions.answered(7, known=0)
    assert (revisions.newest, revisions.went_back(3.0)) == (7, False)
    revisions.answered(5, known=7)
    assert (revisions.newest, revisions.went_back(3.0)) == (5, True)
    clock.now = 3.5
    revisions.answered(6, known=5)
    assert (revisions.newest, revisions.went_back(3.0)) == (6, False)


def test_an_answer_that_is_overtaken_by_a_later_one_is_none() -> None:
    revisions = Revisions(Clock())
    revisions.answered(8, known=6)
    revisions.answered(7, known=6)  # to a request that was sent before the answer above came
    assert (revisions.newest, revisions.went_back(3.0)) == (8, False)
