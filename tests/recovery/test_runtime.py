"""Tests what a survivor yields: every committed step once, in order, whatever other workers applied without it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from elastic.errors import PeerLost
from elastic.worker.registered import Registered
from elastic.worker.runtime import WorkerRuntime
from tests.recovery.test_registered import Counter


class FakeHistory:
    """Knows the decisions on the last two steps, or is told of the one that is resumed."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.answers = {known: SimpleNamespace(step=known) for known in (step - 1, step)}
        self.registered = Registered()

    def answer(self, step: int) -> Any:
        return self.answers.get(step)

    def progress(self) -> dict[int, Any]:
        return {}

    def note(self) -> None:
        pass

    def entering(self) -> None:
        pass

    def left(self) -> None:
        pass

    def left_between(self) -> bool:
        return False

    def learn(self, told: Any) -> None:
        pass

    def changes(self) -> list[Any]:
        return []

    def resume(self, proposal: Any, seen: int) -> None:
        self.answers.setdefault(proposal.resume, SimpleNamespace(step=proposal.resume))
        self.step = proposal.resume


class Recovering:
    """A survivor that had `applied` one step, not handed out (`unseen`) or handed out (up to `yielded`)."""

    def __init__(self, applied: int, unseen: bool, yielded: int) -> None:
        self.held_states: list[Any] = []
        self.proposal: Any = None
        history: Any = FakeHistory(applied)
        job: Any = SimpleNamespace(recovers=True, send=lambda message: None, pulse=lambda: None)
        member: Any = SimpleNamespace(recover=self._recover, report_loss=lambda *_: None)
        self.runtime = WorkerRuntime(job, member, history, lambda step, micro_batch: None, lambda answer: None)
        self.runtime._engine = self.engine()
        self.runtime.unseen = history.answers[applied] if unseen else None
        self.runtime._yielded = yielded

    def engine(self) -> Any:
        rest = SimpleNamespace(damaged={}, told=set())
        nothing: Any = {"salvages": tuple, "abandon": lambda: None, "held": lambda lost: []}
        nothing |= {"begin": lambda retained=(), before=None: None, "note_loop": lambda inventory: None, "back": None}
        return SimpleNamespace(view=SimpleNamespace(epoch=1, workers=(0, 1)), peers=(), rest=rest, **nothing)

    def _recover(self, held_state: Any, last: Any, linked: Any) -> Any:
        self.held_states.append(held_state(()))
        return SimpleNamespace(engine=self.engine(), retained=(), proposal=self.proposal, before=(0, 1, 2), restored=None)

    def recover(self, resume: int, *, others: int = -1, seen: int = -1, results: Any = (), objects: Any = ()) -> None:
        self.comes(resume, others=others, seen=seen, results=results, objects=objects)
        self.runtime._enter_next_view()

    def comes(self, resume: int, *, others: int = -1, seen: int = -1, results: Any = (), objects: Any = ()) -> None:
        view = SimpleNamespace(workers=(0, 1))
        self.proposal = SimpleNamespace(resume=resume, yielded=others, seen=seen, changes=[], objects=objects, results=results, view=view)


@pytest.mark.parametrize(
    ("applied", "unseen", "yielded", "resume", "handed_out", "again"),
    [
        pytest.param(7, True, 6, 7, 7, False, id="goes on behind what it applied"),
        pytest.param(7, True, 6, 6, None, False, id="what it applied is taken back"),
        pytest.param(7, False, 7, 7, None, False, id="abandons a step that nobody applied"),
        pytest.param(7, False, 7, 6, None, True, id="what it handed out is taken again"),
        pytest.param(6, False, 6, 7, 7, False, id="the others applied a step that it did not hear of"),
    ],
)
def test_what_is_handed_out_behind_a_recovery(
    applied: int, unseen: bool, yielded: int, resume: int, handed_out: int | None, again: bool
) -> None:
    worker = Recovering(applied, unseen, yielded)
    worker.recover(resume, others=7)
    found = worker.runtime.unseen
    assert (None if found is None else found.step) == handed_out
    assert (worker.runtime.step <= worker.runtime._yielded) == again


def test_a_pause_that_a_loss_has_overtaken_is_not_waited_for() -> None:
    """Others, who were still in the loop body, and whoever joined have not heard of it, and take the next step."""
    worker = Recovering(7, True, 6)
    runtime = worker.runtime
    runtime.handing_out()
    runtime.handed_out()
    runtime.pausing = True
    flushed = []

    def flush(step: int) -> None:
        flushed.append(step)
        raise PeerLost("worker 1 is gone", peer=1)

    runtime.engine.flush = flush  # pyright: ignore[reportAttributeAccessIssue]
    worker.comes(7)
    assert not runtime.rest()
    assert flushed == [7]
    assert (len(worker.held_states), runtime.step) == (1, 8)


@pytest.mark.parametrize("final", [False, True])
def test_a_request_that_arrives_while_a_step_is_computed_is_made_with_that_step(final: bool) -> None:
    """A joiner need not wait for another step."""
    worker = Recovering(7, False, 7)
    job, history = worker.runtime._job, worker.runtime._history
    vars(job).update(worker=0, epoch=1, stop_requested=False, pause_requested=False, progress=lambda *_, **__: None)
    vars(history).update(median_s=None, committed_at=None, ready=lambda known: "", committed=lambda *_: None)
    wishes = []

    def compute(step: int, batch: Any, wished: Any) -> Any:
        job.pause_requested = job.stop_requested = True
        wishes.append(wished())
        return SimpleNamespace(differ=False, step=step)

    vars(worker.runtime.engine).update(compute=compute, executor=SimpleNamespace(taken_over_s=0.0))
    assert worker.runtime.compute(final=final) is not None
    assert [(each.pause, each.stop) for each in wishes] == [(not final, True)], "members do not change behind the last step"


def test_what_members_do_together_is_named_by_its_place() -> None:
    """Whoever did not take part, or joined later, finds the result under the same name, and its next one has the others' next name."""
    worker = Recovering(7, True, 6)
    runtime = worker.runtime
    assert runtime.together(lambda: "before the loop") == "before the loop"
    runtime.handing_out()
    assert [runtime.together(lambda i=i: i) for i in range(2)] == [0, 1]
    worker.recover(7)
    assert (worker.held_states[0].amid, worker.held_states[0].yielded) == (True, 7)
    assert dict(worker.held_states[0].results) == {"-1/begin/0": "before the loop", "7/body/0": 0, "7/body/1": 1}
    runtime.handed_out()
    worker.recover(7)
    assert not worker.held_states[1].amid

    late = Recovering(7, True, 6)
    late.recover(7, results=worker.held_states[0].results)
    late.runtime.handing_out()
    assert [late.runtime.together(pytest.fail), late.runtime.together(pytest.fail)] == [0, 1]
    late.runtime.at("body", 9)
    assert dict(late.runtime._results) == {"-1/begin/0": "before the loop"}, "nobody is at step 7 any more"


def test_whoever_joins_takes_part_in_what_the_others_still_hand_out() -> None:
    for seen, unseen in ((7, None), (6, 7)):
        joiner = Recovering(-1, False, -1)
        joiner.runtime._engine = None
        joiner.recover(7, others=7, seen=seen)
        found = joiner.runtime.unseen
        assert (None if found is None else found.step) == unseen
        assert joiner.runtime._yielded == seen


def test_whoever_joins_has_registered_objects_as_they_are_behind_the_newest_body_that_is_over_on_all() -> None:
    worker, counter = Recovering(7, True, 6), Counter(6)
    worker.runtime._history.registered.add((counter,), nn.Linear(1, 1))
    worker.runtime._amid = True
    worker.runtime.handed_out()  # of step 6
    worker.runtime.handing_out()
    counter.count = 7
    worker.recover(7)
    worker.runtime.handed_out()
    counter.count = 100  # between two loops: a joiner does that itself
    worker.recover(7)
    told = [held_state.objects for held_state in worker.held_states]
    assert [(step, states[0][0]) for step, states in told] == [(6, "Counter"), (7, "Counter")]
    for seen in (6, 7):
        joiner, joined = Recovering(-1, False, -1), Counter()
        joiner.runtime._engine = None
        joiner.recover(7, others=7, seen=seen, objects=told)
        assert joiner.held_states[0].objects is None
        registered = joiner.runtime._history.registered
        registered.add((joined,), nn.Linear(1, 1))
        registered.begin(warns=False)
        assert joined.count == seen
        joiner.recover(7)
        assert joiner.held_states[1].objects == told[seen - 6], "whom it replaces may have been the last who knew"
