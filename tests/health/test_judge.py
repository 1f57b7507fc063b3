"""Tests the verdicts about workers: which condition is what, after which time, and in which words."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.health import verdict as kinds
from elastic.health.limits import Limits
from elastic.observe.activity import AGENT
from tests.health.observing import LIMITS, Condition, Watched, waiting

SLEEPS = Condition()
SPINS = Condition(state="R", ran=1.0)
STARVES = Condition(state="R", ran=0.001, delayed=0.999)
STOPPED = Condition(state="T", wakes=0.0)
IN_TURNS = Condition(state="T", ran=0.08, wakes=5.0)  # stopped and continued, and seen only while it is stopped


@pytest.mark.parametrize(
    ("condition", "kind", "earliest", "latest"),
    [
        (STOPPED, kinds.STOPPED, 1.0, 1.3),
        (SLEEPS, kinds.HUNG, 3.0, 3.5),
        (SPINS, kinds.SPINNING, 1.0, 1.5),
        (replace(SLEEPS, state="D"), kinds.HUNG, 3.0, 3.5),
        (replace(SLEEPS, longest_s=2.0), kinds.HUNG, 6.0, 6.5),
        (replace(SPINS, longest_s=0.5), kinds.SPINNING, 5.0, 5.5),
        (replace(SPINS, ran=0.25, delayed=0.75), kinds.SPINNING, 4.0, 4.5),
        (replace(SLEEPS, wakes=100.0), kinds.HUNG, 3.0, 3.5),
        (replace(SLEEPS, place="data loader"), kinds.HUNG_LOADER, 9.0, 9.5),
        (replace(SPINS, place="data loader"), kinds.SPINNING, 3.0, 3.5),
        (replace(SLEEPS, place="train_fn"), kinds.HUNG_TRAIN_FN, 300.0, 300.9),
        (replace(SLEEPS, place="checkpoint"), kinds.HUNG_CHECKPOINT, 300.0, 300.9),
        (replace(SLEEPS, first=True), kinds.HUNG, 30.0, 30.5),
        (replace(SLEEPS, longest_s=0.0), kinds.HUNG, 30.0, 30.5),
        (replace(SPINS, first=True), kinds.SPINNING, 300.0, 300.9),
        (replace(SLEEPS, phase="migrate"), kinds.HUNG_RECOVERY, 3.0, 3.5),
        (replace(SPINS, phase="quiesce"), kinds.SPINNING, 300.0, 300.9),
    ],
)
def test_the_root_is_excluded(condition: Condition, kind: str, earliest: float, latest: float) -> None:
    """Worker 0 waits for 2, which waits for 1."""
    job = Watched({0: waiting(2), 1: condition, 2: waiting(1)}).watch(latest + 1.0)
    assert job.excluded == [(1, kind)]
    assert earliest <= job.when() <= latest


@pytest.mark.parametrize(
    "condition",
    [
        STARVES,
        replace(SPINS, first=True, longest_s=0.0),
        replace(SPINS, longest_s=0.0),
        replace(SPINS, place="train_fn"),
        replace(SPINS, place="checkpoint"),
        replace(SPINS, longest_s=200.0),
        replace(SLEEPS, place="train_fn", others=0.5),
        replace(SLEEPS, place="train_fn", io=1e6),
        replace(SLEEPS, place="train_fn", wakes=50.0),
        replace(SLEEPS, first=True, others=0.9),
        replace(SLEEPS, waits_for=AGENT),
    ],
    ids=repr,
)
def test_who_is_never_excluded(condition: Condition) -> None:
    job = Watched({0: waiting(1), 1: condition}).watch(900.0)
    assert job.excluded == []
    assert len(job.reported) <= 1, "each finding is told once"


@pytest.mark.parametrize(
    ("condition", "kind"), [(STARVES, kinds.STARVED), (replace(SPINS, first=True), kinds.SLOW), (replace(SLEEPS, first=True), kinds.SLOW)]
)
def test_what_is_only_reported(condition: Condition, kind: str) -> None:
    assert Watched({0: waiting(1), 1: condition}).watch(12.0).reported == [(1, kind)]


def test_nobody_waits_for_it() -> None:
    job = Watched({0: SPINS, 1: SLEEPS}).watch(100.0)
    assert job.excluded == job.reported == []


def test_it_is_waited_for_by_those_that_come_late() -> None:
    job = Watched({0: replace(SPINS, longest_s=900.0), 1: SLEEPS}).watch(60.0)
    assert job.excluded == []
    assert job.become({0: waiting(1)}).watch(1.0).excluded == [(1, kinds.HUNG)]


def test_progress_ends_a_suspicion() -> None:
    job = Watched({0: waiting(1), 1: SLEEPS})
    for micro_batch in range(20):
        job.become({1: replace(SLEEPS, micro_batch=micro_batch)}).watch(2.5)
    assert job.excluded == []


def test_a_process_that_is_continued_in_time() -> None:
    job = Watched({0: waiting(1), 1: STOPPED})
    for _ in range(20):
        job.become({1: STOPPED}).watch(0.8).become({1: SPINS}).watch(0.4)
    assert job.excluded == []


def test_a_process_that_is_stopped_and_continued_in_turns_is_slow_and_not_stopped() -> None:
    """Whenever it is seen it is stopped; also in one and the same moment, and when it has only begun something else."""
    assert Watched({0: waiting(1), 1: IN_TURNS}).watch(100.0).excluded == []
    job = Watched({0: waiting(1), 1: IN_TURNS})
    for micro_batch in range(40):
        job.become({1: replace(IN_TURNS, micro_batch=micro_batch, wakes=0.0, ran=0.0)}).watch(0.4)
    assert job.excluded == []


def test_a_process_that_is_stopped_and_continued_in_turns_does_not_hang_either() -> None:
    """It is seen in both conditions, and runs for less than a tenth of the time."""
    job = Watched({0: waiting(1), 1: IN_TURNS})
    for number in range(100):
        job.workers[1] = replace(IN_TURNS, state="TS"[number % 2], longest_s=1.0)
        job.watch(0.2)
    assert job.excluded == []


def test_one_that_is_stopped_and_nobody_knows_yet_whether_for_whom() -> None:
    """Others will come to wait for it."""
    assert Watched({0: SPINS, 1: STOPPED}).watch(2.0).excluded == [(1, kinds.STOPPED)]


def test_stopped_workers_may_be_waited_for() -> None:
    job = Watched({0: waiting(1), 1: STOPPED}, limits=Limits(stopped_s=None, hung_s=None)).watch(100.0)
    assert job.excluded == []
    assert job.reported == [(1, kinds.STOPPED)]


def test_hung_workers_may_be_waited_for() -> None:
    job = Watched({0: waiting(1), 1: SLEEPS}, limits=Limits(stopped_s=1.0, hung_s=None)).watch(100.0)
    assert job.excluded == []
    assert job.reported == [(1, kinds.SLOW)]


def test_all_are_stopped_and_continued_one_after_the_other() -> None:
    calm = {0: waiting(2), 1: replace(SPINS, place="data loader"), 2: waiting(1)}
    job = Watched(dict(calm)).watch(1.0)
    job.become({0: STOPPED}).watch(0.2).become(dict.fromkeys(calm, STOPPED)).watch(10.0)
    for worker, condition in calm.items():
        job.become({worker: condition}).watch(0.2)
    assert job.watch(2.0).excluded == []


def test_time_in_which_the_observer_stood_still_does_not_count() -> None:
    job = Watched({0: waiting(1), 1: STOPPED}).watch(0.4)
    assert job.watch(60.0, every=30.0).excluded == []
    assert job.watch(0.4).excluded == [(1, kinds.STOPPED)]


def test_an_observation_that_is_not_new_does_not_count() -> None:
    """As of a host whose messages are late."""
    job = Watched({0: waiting(1), 1: STOPPED, 2: SLEEPS}, asked=(2,)).watch(0.4)
    seen = [condition.observed(worker, job.now) for worker, condition in job.workers.items()]
    for look in range(1000):
        assert job.judge.look(seen, job.now + look, asked=(2,)) == []


def test_who_does_not_answer_in_a_recovery() -> None:
    job = Watched({0: Condition(phase="propose", waits_for=AGENT), 1: SLEEPS, 2: Condition(phase="propose", waits_for=AGENT)}, asked=(1,))
    assert job.watch(3.6).excluded == [(1, kinds.HUNG)]
    assert "the job's recovery waits for it" in job.found[0][1].why


def test_new_workers() -> None:
    born, late = Condition(recorded=False), Condition(recorded=False, waits_for=AGENT)
    job = Watched({0: waiting(1), 1: SPINS, 3: born, 4: replace(late, recorded=True)}, limits=replace(LIMITS, hung_s=2.0), starting=(3, 4))
    job.workers[1] = replace(SPINS, longest_s=900.0)
    assert job.watch(199.0).excluded == []
    assert job.watch(2.0).excluded == [(3, kinds.UNREADY)]
    assert Watched({0: SPINS, 3: replace(born, state="T", wakes=0.0)}, starting=(3,)).watch(2.0).excluded == [(3, kinds.STOPPED)]


def test_in_a_collective_of_the_users_own_the_one_elsewhere_is_to_blame() -> None:
    """Workers 1 to 3 wait in the same line for worker 4, which sleeps in its data loader; the runtime knows of no wait among them."""
    inside = replace(SLEEPS, code="model.py:12")
    job = Watched({0: waiting(1), 1: inside, 2: inside, 3: inside, 4: replace(SLEEPS, place="data loader")}, asked=(2, 3, 4))
    assert job.watch(9.6).excluded == [(4, kinds.HUNG_LOADER)]


def test_one_that_holds_the_interpreter_lock() -> None:
    """Its message to worker 0 was not sent, or what it waits for has come, and it cannot go on."""
    job = Watched({0: waiting(1), 1: replace(waiting(0), mute_s=4.0)}).watch(20.0)
    assert job.excluded == []
    job.workers[1] = replace(job.workers[1], mute_s=6.0)
    assert job.watch(4.0).excluded == [(1, kinds.HUNG)]
    assert "; no Python code has run in it for 6 s; worker 0 waits for it" in job.found[0][1].why


def test_limits_double_after_an_exclusion() -> None:
    job = Watched({0: waiting(1), 1: SLEEPS}).watch(4.0).become({1: replace(SLEEPS, step=8)}).watch(5.8)
    assert len(job.excluded) == 1
    assert len(job.watch(0.8).excluded) == 2
    job.become({1: Condition(phase="apply", micro_batch=-1, step=8, state="R", ran=1.0, longest_s=900.0)}).watch(700.0)
    job.become({1: replace(SLEEPS, step=9)}).watch(3.6)
    assert len(job.excluded) == 3


CONDITIONS = st.builds(
    Condition,
    state=st.sampled_from("RSDTt"),
    ran=st.floats(0.0, 1.0),
    delayed=st.floats(0.0, 1.0),
    place=st.sampled_from(["runtime", "train_fn", "data loader", "checkpoint"]),
    phase=st.sampled_from(["idle", "forward", "ready", "quiesce"]),
    waits_for=st.integers(-2, 4),
    longest_s=st.sampled_from([0.0, 0.01, 1.0]),
    first=st.booleans(),
)


@given(st.lists(CONDITIONS, min_size=1, max_size=5), st.sets(st.integers(0, 4)))
def test_victims_are_never_blamed(conditions: list[Condition], asked: set[int]) -> None:
    job = Watched(dict(enumerate(conditions)), asked=tuple(asked & set(range(len(conditions))))).watch(12.0)
    stopped = {worker for worker, each in job.workers.items() if each.state in "Tt"}
    for _, found in job.found:
        assert found.worker in stopped or job.workers[found.worker].waits_for == -1
        assert found.excludes or found.kind in (kinds.STARVED, kinds.SLOW)
        assert f"worker {found.worker} (process {70 + found.worker}) is {found.kind}: " in found.sentence
    if stopped == set(job.workers):
        assert job.found == []


@given(st.lists(CONDITIONS, min_size=2, max_size=5), st.integers(1, 9))
def test_nobody_is_excluded_who_gets_on(conditions: list[Condition], length: int) -> None:
    """Each worker begins something else every `length` looks, far below each limit; nobody is stopped."""
    job = Watched({worker: replace(each, state="R") for worker, each in enumerate(conditions)})
    for step in range(12):
        job.become({worker: replace(each, step=step) for worker, each in job.workers.items()}).watch(0.2 * length)
    assert job.excluded == []


def sentence(condition: Condition, seconds: float) -> str:
    job = Watched({0: waiting(1), 1: condition, 2: waiting(0)}).watch(seconds)
    return job.found[0][1].sentence


def test_the_evidence_in_words() -> None:
    assert sentence(STOPPED, 2.0) == (
        "worker 1 (process 71) is stopped: its process has been stopped for 1.0 s, in forward of step 7, micro-batch 3 (state T in "
        "here); workers 0 and 2 wait for it"
    )
    assert sentence(replace(SLEEPS, code="model.py:12"), 4.0) == (
        "worker 1 (process 71) is hung: it has used no processor for 3.0 s, in forward of step 7, micro-batch 3, model.py:12, which took "
        "it at most 0.1 s before (state S in here); workers 0 and 2 wait for it"
    )
    assert sentence(SPINS, 4.0) == (
        "worker 1 (process 71) is spinning: it has used 1.0 s of processor time in 1.0 s, in forward of step 7, micro-batch 3, which took "
        "it at most 0.1 s before; workers 0 and 2 wait for it"
    )
    assert sentence(replace(SLEEPS, place="data loader"), 10.0).startswith(
        "worker 1 (process 71) is hung in its data loader: it has used no processor for 9.0 s, in the data loader of step 7, "
    )
    assert sentence(replace(SLEEPS, place="train_fn", code="train.py:40"), 301.0).endswith(
        " s, in the code of train_fn after step 7, train.py:40 (state S in here); workers 0 and 2 wait for it"
    )
    assert re.fullmatch(
        r"worker 1 \(process 71\) is out of processor time: in 10.\d s it ran for 0.0 s and waited for a processor for 10.\d s, in forward "
        "of step 7, micro-batch 3; workers 0 and 2 wait for it; it is not replaced, since another worker here would get no more",
        sentence(STARVES, 11.0),
    )
