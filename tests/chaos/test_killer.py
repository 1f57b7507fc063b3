"""Tests that the killer kills real processes at the right moment."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic.chaos.faults import parse
from elastic.chaos.killer import Killer
from elastic.observe.json_lines import append_lines
from tests.chaos.conftest import PATIENCE_S, Stage

pytestmark = pytest.mark.slow

LONG_ENOUGH_S = 0.05  # killers that poll every half or every five milliseconds


def killer(stage: Stage, *faults: str) -> Killer:
    return Killer(stage.directory, map(parse, faults))


def until(condition: Callable[[], object]) -> None:
    """Waits for what another thread does; looks a thousand times a second."""
    deadline, pause = time.monotonic() + PATIENCE_S, threading.Event()
    while not condition():
        assert time.monotonic() < deadline
        pause.wait(0.001)


def why(subject: Killer) -> list[str]:
    return [str(missed) for missed in subject.close()]


def test_a_worker_dies_in_the_phase_that_was_asked_for(stage: Stage) -> None:
    zero, one = stage.puppet(2)
    before = time.monotonic()
    with killer(stage, "1@8:reduce") as subject:
        stage.commit(1, [zero, one])
        for phase, step in [("reduce", 7), ("forward", 8), ("backward", 8)]:
            zero.enter(phase, step)
            one.enter(phase, step)
        zero.enter("reduce", 8)
        assert not one.dies(LONG_ENOUGH_S)
        one.enter("reduce", 8)
        assert one.dies()
        asked = {"worker": 1, "pid": one.pid, "place": 1, "step": 8, "asked": "1@8:reduce"}
        first, *_ = stage.lines()
        assert before < first.pop("at") < time.monotonic()
        assert first == {**asked, "phase": "reduce", "kind": "kill"}
        until(lambda: len(stage.lines()) == 2)
        (shot,) = subject.shots
        assert stage.lines()[1] == {**asked, "at": shot.at, "observed": "reduce", "kind": "observed"}
        assert shot.observed is not None
        assert (shot.observed.phase, shot.observed.step, shot.epoch) == ("reduce", 8, 1)
    assert subject.missed == ()
    assert not zero.dies(0)


def test_a_step_that_was_over_before_it_was_seen_is_not_claimed(stage: Stage) -> None:
    (zero,) = stage.puppet(1)
    zero.enter("backward", 5)
    stage.commit(1, [zero])
    with killer(stage, "0@3:apply"):
        assert zero.dies()
    assert [(line["asked"], line["step"], line.get("observed", line.get("phase"))) for line in stage.lines()] == [
        ("0@3:apply", 5, "backward")
    ] * 2


def test_what_it_went_on_to_before_it_died_is_observed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    (zero,) = stage.puppet(1)
    stage.commit(1, [zero])

    def append_slowly(path: Path, records: list[dict[str, object]]) -> None:
        append_lines(path, records)
        if records[0]["kind"] == "kill":
            assert not zero.dies(0), "the line is complete first"
            zero.enter("gather", 9)

    monkeypatch.setattr("elastic.chaos.killer.append_lines", append_slowly)
    with killer(stage, "0@8:apply") as subject:
        zero.enter("apply", 8)
        assert zero.dies()
    seen, observed = stage.lines()
    assert (seen["step"], seen["phase"], observed["step"], observed["observed"]) == (8, "apply", 9, "gather")
    assert subject.shots[0].seen.phase == "apply"


def test_a_stopped_worker_dies_as_well(stage: Stage) -> None:
    (zero,) = stage.puppet(1)
    zero.enter("apply", 3)
    os.kill(zero.pid, signal.SIGSTOP)
    stage.commit(1, [zero])
    with killer(stage, "0@3:apply"):
        assert zero.dies()


def test_several_die_at_once(stage: Stage) -> None:
    zero, one, two = stage.puppet(3)
    stage.commit(1, [zero, one, two])
    for puppet in (zero, two):
        puppet.enter("forward", 4)
    with killer(stage, "1,2@4") as subject:
        one.enter("gather", 3)
        assert not two.dies(LONG_ENOUGH_S)
        one.enter("gather", 4)
        assert one.dies()
        assert two.dies()
    kills = [line for line in stage.lines() if line["kind"] == "kill"]
    assert [(line["worker"], line["phase"]) for line in kills] == [(1, "gather"), (2, "forward")]
    assert len({line["at"] for line in kills}) == 1
    assert [shot.observed.phase for shot in subject.shots if shot.observed] == ["gather", "forward"]
    assert not zero.dies(0)


def test_the_next_fault_finds_its_place_in_the_next_view(stage: Stage) -> None:
    zero, one, two = stage.puppet(3)
    stage.commit(1, [zero, one, two])
    with killer(stage, "1@8", "1@8") as subject:
        for puppet in (zero, one, two):
            puppet.enter("forward", 8)
        assert one.dies()
        assert not two.dies(LONG_ENOUGH_S)
        stage.commit(2, [zero, two])
        assert not two.dies(LONG_ENOUGH_S)
        two.enter("gather", 8, epoch=2)
        assert two.dies()
    assert [(shot.worker, shot.place, shot.epoch) for shot in subject.shots] == [(1, 1, 1), (2, 1, 2)]
    assert not zero.dies(0)


def test_a_recovery_is_hit(stage: Stage) -> None:
    zero, one = stage.puppet(2)
    stage.commit(1, [zero, one])
    with killer(stage, "1@8", "0@8:migrate") as subject:
        zero.enter("forward", 8)
        one.enter("forward", 8)
        assert one.dies()
        for phase in ("quiesce", "propose"):
            zero.enter(phase, 7)
        assert not zero.dies(LONG_ENOUGH_S)
        zero.enter("migrate", 7)
        assert zero.dies()
    assert [shot.observed.phase for shot in subject.shots if shot.observed] == ["forward", "migrate"]


def test_who_joined_is_hit_by_place(stage: Stage) -> None:
    zero, one, joiner = stage.puppet(3)
    stage.commit(1, [zero, one])
    with killer(stage, "1@20:apply") as subject:
        one.enter("apply", 15)
        stage.commit(2, [zero, joiner, one])
        one.enter("apply", 20, epoch=2)
        assert not one.dies(LONG_ENOUGH_S)
        joiner.enter("apply", 20, epoch=2)
        assert joiner.dies()
    assert subject.missed == ()


def test_a_fault_without_its_place_is_missed_when_its_step_is_over_and_the_next_one_is_taken(stage: Stage) -> None:
    zero, one = stage.puppet(2)
    stage.commit(1, [zero, one])
    with killer(stage, "7@8", "1@12") as subject:
        one.enter("forward", 8)
        assert not one.dies(LONG_ENOUGH_S)
        one.enter("forward", 12)
        assert one.dies()
    assert why(subject) == ["7@8 did not fire: there is no place 7 in a view of 2 workers"]


def test_what_never_fired_has_a_reason(stage: Stage) -> None:
    zero, one = stage.puppet(2)
    subject = killer(stage, "1@8", "0@9")
    until(lambda: "no view" in subject.missed[0].why)
    assert why(subject) == [
        "1@8 did not fire: no view was committed",
        "0@9 did not fire: it was not its turn",
    ]
    stage.commit(1, [zero, one])
    one.enter("backward", 5)
    subject = killer(stage, "1@8")
    until(lambda: subject.missed[0].why == "worker 1 at place 1 was last seen in step 5, backward")
    os.kill(one.pid, signal.SIGKILL)
    until(lambda: subject.missed[0].why == "worker 1 at place 1 had ended in step 5, backward")
    subject.close()
    subject = killer(stage, "3@8")
    until(lambda: subject.missed[0].why == "there is no place 3 in a view of 2 workers")
    assert len(subject.close()) == 1
    assert subject.shots == ()
    assert stage.lines() == []
    assert not zero.dies(0)


def test_nobody_else_with_its_pid_is_hit(stage: Stage) -> None:
    (zero,) = stage.puppet(1)
    zero.enter("forward", 9)
    stage.commit(1, [zero], forkserver=1)
    subject = killer(stage, "0@8")
    until(lambda: "had ended" in subject.missed[0].why)
    assert not zero.dies(LONG_ENOUGH_S)
    subject.close()
    assert stage.lines() == []


def test_a_directory_that_is_gone_means_that_the_job_is_over(stage: Stage) -> None:
    (zero,) = stage.puppet(1)
    stage.commit(1, [zero])
    zero.enter("forward", 7)
    subject = killer(stage, "0@8")
    until(lambda: "step 7" in subject.missed[0].why)
    shutil.rmtree(stage.directory)
    zero.enter("forward", 8)
    until(lambda: "the job was over" in subject.missed[0].why)
    assert len(subject.close()) == 1
    assert not zero.dies(0)


def test_it_may_start_before_the_directory_is_there_and_end_without_a_job(tmp_path: Path) -> None:
    with Killer(tmp_path / "later", [parse("0@0")]) as subject:
        pass
    assert len(subject.close()) == 1
    with Killer(tmp_path, []) as subject:
        pass
    assert subject.missed == ()


def test_a_fault_without_a_phase_hits_somewhere_within_its_step(stage: Stage) -> None:
    step_s = 0.08
    fractions = []
    for seed in range(4):
        (running,) = stage.puppet(1, step_s=step_s)
        until((stage.directory / "activity" / str(running.worker)).exists)
        stage.commit(1, [running])
        with Killer(stage.directory, [parse("0@4")], seed=seed) as subject:
            assert running.dies()
        (shot,) = subject.shots
        assert shot.observed is not None
        assert shot.observed.step in (4, 5)
        fractions.append(("forward", "backward", "reduce", "apply").index(shot.observed.phase) + 4 * (shot.observed.step - 4))
    assert len(set(fractions)) > 1, "seeds differ in the moment"


def test_it_sleeps_most_of_the_time(stage: Stage) -> None:
    zero, one = stage.puppet(2)
    stage.commit(1, [zero, one])
    zero.enter("forward", 7)
    one.enter("forward", 7)
    with killer(stage, "0,1@8:apply") as subject:
        until(lambda: "step 7" in subject.missed[0].why)
        cpu, clock = time.process_time(), time.monotonic()
        threading.Event().wait(0.3)
        share = (time.process_time() - cpu) / (time.monotonic() - clock)
    assert share < 0.3
