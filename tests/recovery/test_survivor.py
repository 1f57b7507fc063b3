"""What a survivor hands out: every step that counts once, in order, whatever the others had applied without it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from elastic.survivor import Survivor


class FakeHistory:
    """Knows the decisions on the last two steps, or is told of the one that is resumed."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.answers = {known: SimpleNamespace(step=known) for known in (step - 1, step)}

    def answer(self, step: int) -> Any:
        return self.answers.get(step)

    def progress(self) -> dict[int, Any]:
        return {}

    def resume(self, proposal: Any) -> None:
        self.answers.setdefault(proposal.resume, SimpleNamespace(step=proposal.resume))
        self.step = proposal.resume


def recovered(applied: int, unseen: list[int], yielded: int, resume: int, others: int = -1) -> list[int]:
    """The steps that are handed out next by a survivor that had `applied` one when the others resume one."""
    proposal = SimpleNamespace(resume=resume, yielded=others, results=[], view=SimpleNamespace(workers=(0, 1)))
    joined = SimpleNamespace(engine=object(), retained=(), proposal=proposal, before=(0, 1, 2), restored=None)
    member: Any = SimpleNamespace(recover=lambda stock, last, linked: joined)
    history: Any = FakeHistory(applied)
    survivor = Survivor(SimpleNamespace(), member, history, lambda step, micro_batch: None, lambda answer: None)  # pyright: ignore[reportArgumentType]
    survivor.unseen = [history.answers[step] for step in unseen]
    survivor._yielded = yielded
    survivor._enter_next_view()
    found = [answer.step for answer in survivor.unseen]
    assert survivor.overdue == bool(found and found[0] <= others)
    assert [survivor.handing_out().step for _ in found] == found
    return found


@pytest.mark.parametrize(
    ("applied", "unseen", "yielded", "resume", "handed_out"),
    [
        pytest.param(7, [7], 6, 7, [7], id="goes on behind what it applied"),
        pytest.param(7, [7], 6, 6, [], id="what it applied is taken back"),
        pytest.param(6, [], 6, 6, [], id="abandons a step that nobody applied"),
        pytest.param(6, [6], 5, 7, [6, 7], id="the others applied a step that it did not hear of"),
        pytest.param(6, [], 6, 7, [7], id="it did not hear of it inside of its loop"),
    ],
)
def test_what_is_handed_out_behind_a_recovery(applied: int, unseen: list[int], yielded: int, resume: int, handed_out: list[int]) -> None:
    assert recovered(applied, unseen, yielded, resume) == handed_out


def test_what_others_have_handed_out_is_overdue() -> None:
    """They may be in an evaluation behind it, and wait there."""
    assert recovered(7, [7], 6, 7, others=7) == [7]
    assert recovered(7, [7], 6, 7, others=6) == [7]
    assert recovered(6, [6], 5, 7, others=6) == [6, 7]
