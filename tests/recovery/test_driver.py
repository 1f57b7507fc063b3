"""Tests the driver with a fake crew that records messages, an etcd controlled by the test, and a fake clock."""

from __future__ import annotations

import functools
import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from elastic.agent.supervision import own_doing
from elastic.control.state import Phase
from elastic.control.transitions import SUSPICION_S
from elastic.errors import Conflict, CoverageLost, EtcdUnavailable, GateRefused
from elastic.host.channel import AGENT_GONE
from elastic.membership.etcd_thread import DEADLINE_S
from elastic.observe import incident
from elastic.observe.activity import Activity
from elastic.observe.records import Records
from elastic.recovery.resume import Disagreement
from tests.announcement import announcement
from tests.recovery.driving import FIRST_PID, Scene, scene_of


@pytest.fixture
def scene(tmp_path: Path) -> Callable[..., Scene]:
    return functools.partial(scene_of, tmp_path)


def test_a_death_goes_through_etcd_to_the_next_view(scene: Callable[..., Scene]) -> None:
    job = scene()
    job.die(1)
    job.inventories()
    job.votes()
    assert job.attempts.calls == [
        ("begin", (2, 1)),
        ("publish", (2, 1)),
        ("vote", (2, 1), {0: None, 2: None}),
        ("commit", (2, 1), (0, 2), 1),
        ("sweep",),
    ]
    assert job.crew.messages("view") == [0, 2]
    record = json.loads(job.directory.members.read_text())
    assert (record["epoch"], record["attempt"], record["coordinator"], record["forkserver"]) == (2, 1, 0, 77)
    assert [(member["worker"], member["pid"]) for member in record["members"]] == [(0, FIRST_PID), (2, FIRST_PID + 2)]
    job.driver.seen(job.driver.view)
    assert job.crew.messages("view") == [], "it is not announced twice"
    job.die(2)
    job.inventories()
    job.votes()
    assert job.attempts.calls[-2] == ("commit", (3, 1), (0,), 2), "from the last one"


def test_workers_that_die_together_are_left_out_together(scene: Callable[..., Scene]) -> None:
    job = scene(workers=4)
    job.die(1, 2)
    job.inventories()
    job.votes()
    assert job.attempts.calls[:2] == [("begin", (2, 1)), ("publish", (2, 1))]
    assert job.driver.view.workers == (0, 3)
    job.crew.fork(7)
    job.die(7, 3)
    assert job.attempts.calls[-1] == ("begin", (3, 1)), "worker 7 was no member"


def test_the_incident_has_the_figures(scene: Callable[..., Scene]) -> None:
    job = scene()
    job.say(0, "progress", epoch=1, step=12, step_s=0.2, committed_at=49.9, committed=10)
    job.say(2, "lost", peer=1, reason="reset", epoch=1, step=12, phase="gather", at=49.99)
    job.die(1)
    job.now = 50.004
    job.inventories()
    job.now = 50.014
    job.votes()
    job.now = 50.02
    job.resume()
    job.commits(epoch=2, step=12, at=50.32)
    assert job.driver.incidents == [found.to_json() for found in incident.read(job.directory.incidents)]
    (found,) = incident.read(job.directory.incidents)
    assert (found.kind, found.worker, found.place, found.epoch, found.attempts) == ("death", 1, 1, 2, 1)
    assert found.phases_ms == {"quiesce": 4.0, "propose": 0.0, "migrate": 8.0, "gate": 2.0, "commit": 0.0}
    assert (found.detected_ms, found.redo_ms) == (10.0, 300.0)
    assert found.stall_ms == 20.0, "step 12 would have been committed at 50.3 without the fault"
    assert (found.bytes_moved, found.bytes_minimum, found.samples_lost) == (900, 900, 0)
    assert (found.links_kept, found.links_dropped, found.links_made, found.joined) == (4, 2, 0, ())
    assert "worker 1" in job.said[-1]
    job.commits(epoch=2, step=13, at=50.42)
    assert len(job.driver.incidents) == 1


def test_lost_work_is_counted_from_what_the_workers_were_doing(scene: Callable[..., Scene], tmp_path: Path, monkeypatch) -> None:
    job = scene()
    for worker in range(3):
        monkeypatch.setattr("os.getpid", lambda worker=worker: FIRST_PID + worker)
        activity = Activity(tmp_path, worker)
        activity.enter("backward", 12, 1, 3)
        activity.close()
    job.say(2, "progress", epoch=1, step=12, step_s=0.2, committed_at=49.9, committed=10)
    job.die(1)
    job.inventories()
    job.votes()
    job.driver.close()
    (found,) = incident.read(job.directory.incidents)
    assert (found.step, found.phase, found.steps_redone) == (12, "backward", 1)
    assert found.lost_ms == pytest.approx(100.0)
    assert found.stall_ms is None, "the job ended before a step was committed"


def test_a_replacement_joins(scene: Callable[..., Scene]) -> None:
    job = scene(respawn=True)
    job.die(1)
    job.inventories()
    assert 3 not in job.crew.workers
    job.votes()
    job.resume()
    assert 3 not in job.crew.workers
    job.commits(epoch=2, step=12, at=job.now)
    assert 3 in job.crew.workers
    job.say(3, "announce", ready=announcement())
    assert job.admitted == [3]
    assert job.timers.act is not None
    job.timers.act()
    assert 3 in job.crew.messages("prepare"), "it prepares its memory until the others have paused"
    assert job.crew.messages("boundary") == [0, 2]
    for worker in (0, 2):
        job.say(worker, "paused", epoch=2, step=11)
    job.inventories()
    job.votes()
    job.resume()
    job.commits(epoch=3, step=12, at=job.now)
    joined = job.driver.incidents[-1]
    assert (joined["kind"], joined["joined"], joined["steps_redone"], joined["step"]) == ("join", [3], 0, 11)


def replaced(scene: Callable[..., Scene]) -> Scene:
    """Worker 1 has died, the others train, and worker 3 was started."""
    job = scene(respawn=True)
    job.die(1)
    job.inventories()
    job.votes()
    job.resume()
    job.commits(epoch=2, step=12, at=job.now)
    return job


def test_a_joiner_that_differs_is_refused_with_the_reason(scene: Callable[..., Scene]) -> None:
    job = replaced(scene)
    job.say(3, "announce", ready={**announcement(), "digest": "e"})
    assert "worker 3 cannot train together with worker 0: digest is 'e' there" in job.crew.killed[3]
    job.die(3)
    assert any(f"worker 3 (process {FIRST_PID + 3}) was ended" in said and "before it had joined" in said for said in job.said)
    assert job.admitted == []
    assert [found["kind"] for found in job.driver.incidents] == ["death"]
    assert 4 in job.crew.workers


def test_a_joiner_whose_train_function_fails_or_returns_is_let_go(scene: Callable[..., Scene]) -> None:
    job = replaced(scene)
    assert job.driver.joining(3)
    job.driver.failed_to_join(3, "ValueError: no")
    assert job.crew.killed == {3: "ValueError: no"}
    job.die(3)
    job.driver.finished(4)
    assert "returned before it made a Trainer" in job.crew.killed[4]
    assert job.outcomes == []


@pytest.mark.parametrize(
    ("error", "kind"), [(CoverageLost("layer 3 is gone"), "CoverageLost"), (GateRefused("layer 3 is gone", check="coverage"), "JobFailed")]
)
def test_what_cannot_be_proposed_ends_the_job(scene: Callable[..., Scene], error: Exception, kind: str) -> None:
    job = scene()
    job.refuse = error
    job.die(1)
    job.inventories()
    assert job.outcomes[0]["kind"] == kind
    assert "layer 3 is gone" in job.outcomes[0]["message"]


def test_a_death_while_a_proposal_is_computed_makes_it_worthless(scene: Callable[..., Scene]) -> None:
    """It is computed aside: the loop hears what happens meanwhile. The proposal of an earlier attempt is dropped, its error too."""
    job = scene(workers=4)
    job.computing = []
    job.die(1)
    job.inventories()
    job.die(2)
    job.inventories()
    first, second = job.computing
    job.refuse = CoverageLost("without the state of worker 2")
    first()
    assert job.attempts.calls == [("begin", (2, 1)), ("begin", (2, 2))]
    assert (job.outcomes, job.crew.messages("propose")) == ([], [])
    job.refuse = None
    second()
    job.votes()
    assert job.attempts.calls[2:] == [
        ("publish", (2, 2)),
        ("vote", (2, 2), {0: None, 3: None}),
        ("commit", (2, 2), (0, 3), 1),
        ("sweep",),
    ]
    first()
    assert job.driver.view.workers == (0, 3)


def test_what_members_find_wrong_is_in_the_incident(scene: Callable[..., Scene]) -> None:
    """Worker 1 names itself; worker 2 only says that copies differ."""
    finding = {"state": "param", "layer": 0, "start": 0, "stop": 64, "step": 4, "good": 3, "copy": "the", "parameters": ["0.w"]}
    finding |= {"host": None, "digests": {"owner worker 1": "aa", "replica worker 2": "bb"}}
    for named, others in ((1, None), (None, 1)):
        job = scene()
        message = {
            "type": "lost",
            "peer": None,
            "epoch": 1,
            "step": 6,
            "phase": "ready",
            "at": 0.0,
            "reason": "it differs",
            "damaged": True,
        }
        job.driver.heard(2 if named is None else 1, {**message, "findings": [{**finding, "worker": named}]})
        if others is not None:
            job.driver.heard(others, {**message, "findings": [{**finding, "worker": others}]})
        job.driver.close()
        (found,) = job.driver.incidents
        assert (found["kind"], found["worker"]) == ("damage", named)
        assert [each["worker"] for each in found["findings"]] == [named, *([others] if others is not None else [])]
        assert found["also"] == ([] if others is None else [others])


def test_copies_that_differ_in_inventories_are_in_the_incident(scene: Callable[..., Scene]) -> None:
    job = scene()
    job.conflicts = (Disagreement(layer=0, start=0, stop=64, step=4, copies=((1, "previous", "aa"), (2, "replica", "bb"))),)
    job.die(0)
    job.inventories()
    job.driver.close()
    (found,) = job.driver.incidents
    assert (found["kind"], found["worker"]) == ("death", 0)
    (finding,) = found["findings"]
    assert (finding["step"], finding["good"], finding["worker"]) == (4, 11, None)
    assert list(finding["digests"].values()) == ["aa", "bb"]
    assert any("so all workers go back to the state after step 11" in said for said in job.said)


def test_an_outage_holds_the_commit_back_and_loses_nothing(scene: Callable[..., Scene]) -> None:
    job = scene()
    job.die(1)
    job.inventories()
    job.etcd_thread.away = True
    job.driver.away(EtcdUnavailable("etcd cannot be reached"))
    job.votes()
    assert job.driver.state.phase is Phase.COMMITTING
    job.die(2)
    job.etcd_thread.work()
    assert job.driver.state.view.workers == (0, 2)
    assert job.attempt_id == (3, 1), "the death in the meantime is the next recovery"
    assert "etcd cannot be reached; the recovery waits for it" in job.said
    job.driver.away(EtcdUnavailable("etcd cannot be reached"), 60.0)
    assert job.said[-1] == "etcd cannot be reached; the recovery waits for it, 60 s by now; the job ends after 600 s"


def test_nobody_hears_of_an_attempt_before_its_number_is_burned(scene: Callable[..., Scene]) -> None:
    job = scene(4)
    job.etcd_thread.away = True
    job.die(1)
    assert job.crew.messages("quiesce") == []
    job.die(2)
    job.etcd_thread.away = False
    job.etcd_thread.work()
    assert job.attempts.calls == [("begin", (2, 2))]
    assert [message["attempt"] for _, message in job.crew.told] == [2, 2]
    assert job.crew.messages("quiesce") == [0, 3]


def test_what_a_dead_worker_announced_is_not_kept(scene: Callable[..., Scene]) -> None:
    job = replaced(scene)
    job.crew.workers[3].announced = announcement()
    job.die(3)
    assert job.crew.workers[3].announced is None


@pytest.mark.parametrize(("limit", "excluded"), [(1.0, True), (None, False)])
def test_a_stopped_worker_is_replaced(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch, limit: float | None, excluded: bool
) -> None:
    monkeypatch.setattr("elastic.agent.looking.Looker._state", lambda _, pid: "T" if pid == FIRST_PID + 1 else "S")
    job = scene(stopped_after=limit)
    monkeypatch.setattr("elastic.agent.looking.time", SimpleNamespace(monotonic=lambda: job.now))
    for _ in range(13):
        job.now += 0.2
        job.timers.timers["watch"][1]()
    if excluded:
        assert job.crew.killed == {1: "its process has been stopped for 1.0 s, before its first step (state T)"}
        assert job.said == []
    else:
        assert job.crew.killed == {}
        who = f"worker 1 (process {FIRST_PID + 1})"
        assert job.said == [f"{who} is stopped: its process has been stopped for 2.0 s, before its first step (state T)"]


def test_a_planned_change_waits_for_etcd_while_the_training_goes_on(scene: Callable[..., Scene]) -> None:
    job = replaced(scene)
    job.etcd_thread.away = True
    job.say(3, "announce", ready=announcement())
    assert job.timers.act is not None
    job.timers.act()
    job.driver.away(EtcdUnavailable("etcd cannot be reached"), 60.0)
    assert job.said[-1] == "etcd cannot be reached; the training goes on, and a planned change waits for it"
    assert job.crew.messages("boundary") == []
    assert {task.deadline_s for task in job.etcd_thread.waiting if task.wanted()} == {math.inf, DEADLINE_S}, "the other lists the joiner"
    job.etcd_thread.away = False
    job.etcd_thread.work()
    assert job.crew.messages("boundary") == [0, 2]


def test_what_an_abandoned_attempt_wanted_of_etcd_is_not_done(scene: Callable[..., Scene]) -> None:
    job = scene(4)
    job.etcd_thread.away = True
    job.die(1)
    job.die(2)
    job.etcd_thread.work()
    assert job.attempts.calls == [("begin", (2, 2))]


def test_a_commit_that_etcd_refuses_is_another_attempt(scene: Callable[..., Scene]) -> None:
    job = scene()
    job.attempts.error = Conflict("agent there coordinates")
    job.die(1)
    assert job.attempt_id == (2, 3)
    assert "3 attempts; the last failure: agent there coordinates" in job.outcomes[0]["message"]


def test_a_peer_that_is_lost_but_runs_is_ended_and_called_an_eviction(scene: Callable[..., Scene]) -> None:
    job = scene()
    job.say(0, "lost", peer=2, reason="reset", epoch=1, step=4, phase="gather", at=job.now)
    assert job.timers.due == SUSPICION_S
    job.now += SUSPICION_S
    assert job.timers.act is not None
    job.timers.act()
    assert job.crew.killed.keys() == {2}
    job.die(2)
    job.inventories()
    job.votes()
    job.driver.close()
    assert job.driver.incidents[0]["kind"] == "eviction"
    assert "workers [0] lost their links" in job.driver.incidents[0]["why"]


@pytest.mark.parametrize(
    ("phase", "status", "blamed"),
    [
        ("backward", -signal.SIGSEGV, True),
        ("forward", 1, True),
        ("gather", -signal.SIGSEGV, False),
        ("backward", -signal.SIGKILL, False),
        ("backward", -signal.SIGTERM, False),
        ("backward", AGENT_GONE, False),
    ],
)
def test_an_input_is_blamed_only_for_what_those_that_computed_it_did_to_themselves(
    scene: Callable[..., Scene], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, status: int, blamed: bool
) -> None:
    """Nobody has declared anything."""
    job = scene(5)
    for worker, epoch in ((1, 1), (2, 2), (3, 3)):
        assert job.outcomes == []
        monkeypatch.setattr("os.getpid", lambda worker=worker: FIRST_PID + worker)
        activity = Activity(tmp_path, worker)
        activity.enter(phase, 12, epoch, 3)
        activity.close()
        job.die(worker, status=status)
        job.inventories()
        job.votes()
    assert bool(job.outcomes) == blamed
    assert not blamed or "micro-batch 3 of step 12 has ended or hung every worker that computed it (1, 2, 3)" in job.outcomes[0]["message"]


def test_whom_we_end_ourselves_is_not_ended_by_an_input(scene: Callable[..., Scene]) -> None:
    worker = scene().crew.workers[1]
    worker.kill("it does not answer")
    worker.gone, worker.status = True, -signal.SIGSEGV
    assert not own_doing(worker)


def test_when_it_is_complete(scene: Callable[..., Scene]) -> None:
    job = scene()
    for worker in (0, 1):
        job.driver.finished(worker)
    assert not job.driver.complete
    job.die(2)
    assert job.driver.complete, "the leader's result is in, and nobody is left to wait for"


def test_an_incident_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("elastic.observe.console.say", said.append)
    monkeypatch.setattr("elastic.observe.records.own", Records())
    carrier = scene_of(tmp_path / "gone").carrier
    shutil.rmtree(tmp_path / "gone", ignore_errors=True)
    for _ in range(2):
        carrier.log(incident.Incident(kind="death", worker=1, step=3))
    assert len(said) == 1
    assert said[0].startswith("records of this run cannot be written any more, and will lack what happens now: ")
