"""Tests each oracle: it passes a run in which all went well, and names what is wrong with one that is spoiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from elastic.chaos.evidence import Evidence, HostEnd, Left, WorkerNotes
from elastic.chaos.injection import parse
from elastic.chaos.oracles import ALL, FAIL, PASS, UNKNOWN, Finding, judge, verdict_of
from elastic.chaos.oracles.ending import allowed_s
from elastic.chaos.sampler import Promises, Seen, Use
from elastic.chaos.scene import Effect, Hit
from elastic.chaos.schedule import JobSpec, Schedule
from elastic.observe.activity import Doing
from tests.chaos.evidence import STEPS, fine, given, incident, notes, uses


def found(evidence: Evidence, oracle: str) -> Finding:
    (finding,) = [each for each in judge(evidence) if each.oracle == oracle]
    return finding


def first(evidence: Evidence, **changes: Any) -> Evidence:
    """With other notes of worker 0."""
    return replace(evidence, workers=(replace(evidence.workers[0], **changes), *evidence.workers[1:]))


def with_step(step: int, **changes: Any) -> Evidence:
    """With one step given otherwise to worker 0."""
    evidence = fine()
    other = tuple(given(0, each.step, **changes) if each.step == step else each for each in evidence.workers[0].given)
    return first(evidence, given=other)


def seen(**changes: Any) -> Evidence:
    known = fine().seen
    return fine(seen=Seen(**{"views": known.views, "uses": known.uses, "machine": known.machine, "looks": 1, "read": 1, **changes}))


def loads(change: Callable[[int, int, tuple[int, ...]], tuple[int, ...] | None]) -> Evidence:
    """With other samples in micro-batches, None: it was not loaded; by all workers alike."""

    def changed(worker: WorkerNotes) -> WorkerNotes:
        kept = ((step, part, change(step, part, taken or ())) for step, part, taken in worker.loads)
        return replace(worker, loads=tuple(each for each in kept if each[2] is not None))

    return fine(workers=tuple(map(changed, fine().workers)))


def test_a_run_in_which_all_went_well_passes_every_oracle():
    findings = judge(fine())
    assert [(each.oracle, each.reason) for each in findings if each.verdict != PASS] == []
    assert len(findings) == len(ALL) == len({each.oracle for each in findings})
    assert verdict_of(findings) == PASS


AGAIN = (notes(0, range(10)), notes(0, range(6, STEPS), run="b", began=60.0, digests={STEPS: "d"}))
VIEW = "/elastic/a/view"

SPOILED = [
    ("losses", lambda: with_step(12, loss=1.5), "step 12 has loss 1.5, undisturbed 1.8"),
    ("losses", lambda: with_step(12, grad_norm=13.000001), "step 12 has loss 1.8"),
    ("losses", lambda: with_step(12, loss=1.5), "Just before: kill@8 place=1"),
    ("losses", lambda: first(fine(), given=(*fine().workers[0].given, given(0, STEPS, at=60.0))), "step 20 has loss"),
    ("digest", lambda: first(fine(), digests={STEPS: "other"}), "the parameters after 20 steps differ"),
    ("handed out once", lambda: first(fine(), given=(*fine().workers[0].given, given(0, 19))), "worker 0 was given step 19 after step 19"),
    ("handed out once", lambda: first(fine(), given=tuple(given(0, step) for step in range(20) if step != 15)), "step 16 after step 14"),
    ("handed out once", lambda: fine(workers=AGAIN), "started again at step 6 without a checkpoint"),
    (
        "samples",
        lambda: loads(lambda step, part, taken: None if (step, part) == (9, 1) else taken),
        "micro-batch 1 of step 9 was loaded by nobody",
    ),
    ("handed out once", lambda: with_more_steps(), "loops ended after 20 steps, and the undisturbed run goes on"),
    ("handed out once", lambda: joined(range(10, STEPS)), "worker 2 was given step 10 first, and all others of that view step 8"),
    ("handed out once", lambda: joined(range(8, 15)), "loops that ended by themselves were given steps up to 14, 19"),
    ("samples", lambda: loads(lambda step, _, taken: (taken[0], taken[0]) if step == 9 else taken), "after step 9, sample"),
    ("samples", lambda: first(fine(), loads=((0, 0, (5, 6)), *fine().workers[0].loads)), "micro-batch 0 of step 0 had different samples"),
    ("agreement", lambda: with_step(3, loss=9.0), "step 3: worker 0 was given loss 9.0, and worker 1 2.7"),
    ("one history", lambda: seen(views=[(49.0, 0, 2, (0, 1)), (51.0, 0, 1, (0,))]), "host 0 knew epoch 1 after epoch 2"),
    ("one history", lambda: seen(views=[(49.0, 0, 1, (0, 1)), (51.0, 1, 1, (0,))]), "epoch 1 has different members"),
    ("one history", lambda: with_step(12, layout="[0-3]x1 [4-5]x1"), "epoch 2 has layouts"),
    ("one history", lambda: with_step(12, epoch=1, layout="[0-2]x1 [3-5]x1", workers=2), "worker 0 went from epoch 2 to 1"),
    (
        "one history",
        lambda: fine(history=((VIEW, '{"epoch": 2, "digest": "x"}'), (VIEW, '{"epoch": 2, "digest": "y"}'))),
        "replaced by one of epoch 2",
    ),
    (
        "one history",
        lambda: fine(history=((VIEW, '{"epoch": 2, "digest": "x"}'), (VIEW, '{"epoch": 1, "digest": "y"}'))),
        "replaced by one of epoch 1",
    ),
    ("one history", lambda: fine(history=((VIEW, "what"),)), "was written as 'what'"),
    ("promises", lambda: seen(breaches=["worker 1 was in apply"]), "worker 1 was in apply"),
    ("accounts", lambda: fine(incidents=(incident(samples_lost=4),)), "lost 4 samples"),
    ("accounts", lambda: fine(incidents=(incident(layout_after="[0-2]x1 [4-5]x1"),)), "has not each layer once"),
    ("accounts", lambda: fine(incidents=(incident(bytes_moved=9),)), "moved 9 bytes, and needs at least 10"),
    ("accounts", lambda: seen(unreadable=["incidents.jsonl, line 4, is not JSON"]), "incidents.jsonl, line 4, is not JSON"),
    (
        "accounts",
        lambda: fine(hosts=(HostEnd(number=0, codes=(0,), log="x\nthe agent failed:\nTraceback"),)),
        "host 0 said: the agent failed",
    ),
    ("accounts", lambda: fine(incidents=()), "worker 1 was killed in epoch 1, and no incident has it"),
    (
        "blame",
        lambda: fine(incidents=(incident(kind="eviction", worker=0, why="it hangs"),)),
        "eviction of workers [0], whom no fault hit: it hangs",
    ),
    ("blame", lambda: fine(incidents=(incident(kind="damage", worker=None, why="copies differ"),)), "no fault touched them: copies differ"),
    (
        "ended",
        lambda: fine(stuck="the job made no step for 90 s"),
        "the job made no step for 90 s. The log ends with: elastic: worker 1 died",
    ),
    ("ended", lambda: fine(hosts=(HostEnd(number=0, codes=(1,), log="error: lost"),)), "host 0 ended with exit code 1: error: lost"),
    ("ended", lambda: fine(workers=AGAIN), "the job was started again 1 times, and no fault of the schedule ends a job"),
    ("left behind", lambda: fine(left=Left(processes=("5: etcd",))), "a process is left: 5: etcd"),
    ("left behind", lambda: fine(left=Left(files=("tmp/x",))), "a file is left: tmp/x"),
    ("left behind", lambda: fine(left=Left(keys=("/elastic/a/view",))), "a key is left in etcd"),
    ("resources", lambda: seen(uses=uses(7, threads=9)), "the agent has 9 threads, before the first fault 5"),
    ("resources", lambda: seen(uses=uses(7, descriptors=60)), "the agent has 60 open descriptors, before the first fault 30"),
    ("resources", lambda: leaking(6), "the agent has 36 open descriptors, and had 30 6 views ago"),
    ("resources", lambda: seen(uses=uses(7, stale=13)), "the agent has 13 open files of processes that have ended"),
    ("resources", lambda: busy(0.9), "the agent computes 0.91 s in each second, before the first fault 0.01 s"),
    ("left behind", lambda: fine(left=Left(leases=2)), "2 leases are left in etcd"),
    ("stalls", lambda: with_late(20.0), "20.10 s before step 12, at most"),
]


def with_more_steps() -> Evidence:
    """A script that ended by itself; the undisturbed run has one step more."""
    known = fine().reference
    assert known is not None
    return fine(last=None, reference=replace(known, losses=(*known.losses, 0.9), grad_norms=(*known.grad_norms, 21.0)))


def joined(steps: range) -> Evidence:
    """Another worker is a member from the second view on, and its loop is given these steps."""
    return fine(workers=(*fine().workers, notes(2, steps)))


def leaking(views: int) -> Evidence:
    """The agent has one descriptor more for each new view, and fewer in its end."""
    late = [Use(at=52.0, pid=7, role="agent", members=2, threads=5, descriptors=30 + views, cpu_s=1.0), *uses(7, descriptors=24)[1:]]
    known = [(49.0, 0, 1, (0, 1)), *((50.8 + epoch / 10, 0, epoch, (0, 1)) for epoch in range(2, 2 + views))]
    return seen(uses=[*uses(7)[:1], *late], views=known)


def handed_over(now: int, leaked: int = 0) -> Evidence:
    """The agent coordinates since the other host was lost; 6 views follow, with each of which it may have some descriptors more."""
    loss = parse("host-loss@8")
    effect = Effect(loss, at=50.8, until=50.9, hits=[], proof="it died", why=None)
    common: dict[str, Any] = {"pid": 7, "role": "agent", "members": 2, "threads": 5, "cpu_s": 1.0}
    late = [Use(at=at, descriptors=found, **common) for at, found in ((56.0, now), *((at, now + 6 * leaked) for at in (57.0, 57.1)))]
    known = [(49.0, 0, 1, (0, 1)), *((56.0 + epoch / 10, 0, epoch, (0, 1)) for epoch in range(2, 8))]
    moved = replace(fine(), schedule=Schedule(job=JobSpec(hosts=2, workers=1, steps=STEPS), injections=(loss,)), effects=(effect,))
    return replace(moved, seen=seen(uses=[*uses(7)[:1], *late], views=known).seen)


def test_an_agent_that_takes_over_has_more_descriptors_and_still_may_not_leak() -> None:
    assert found(handed_over(38), "resources").verdict == PASS
    leaks = found(handed_over(33, leaked=1), "resources")
    assert (leaks.verdict, leaks.reason) == (FAIL, "the agent has 39 open descriptors, and had 33 6 views ago")


def test_an_agent_with_a_spare_more_than_before_the_first_fault_has_its_descriptors_too() -> None:
    """Each process that it started takes some; only times with as many are compared."""
    known = [(49.0, 0, 1, (0, 1)), *((50.8 + epoch / 10, 0, epoch, (0, 1)) for epoch in range(2, 8))]
    more = seen(uses=uses(7, descriptors=36, watched=3), views=known)
    assert found(more, "resources").verdict == PASS
    alike = [replace(use, watched=3) for use in uses(7, descriptors=36)]
    assert found(seen(uses=alike, views=known), "resources").verdict == FAIL


def test_what_a_process_has_while_it_connects_is_not_compared() -> None:
    """The first fault came within the job's first half second, and a worker was looked at before it had all of its links."""
    early = Use(at=49.5, pid=8, role="worker 0", members=2, threads=5, descriptors=15, cpu_s=1.0)
    late = replace(early, at=60.0, descriptors=22)
    known = [(49.0, 0, 1, (0, 1)), *((50.8 + epoch / 10, 0, epoch, (0, 1)) for epoch in range(2, 9))]
    assert found(seen(uses=[*uses(7), early, late], views=known), "resources").verdict == PASS
    leaks = found(seen(uses=[*uses(7), early, replace(early, at=50.2), late], views=known), "resources")
    assert (leaks.verdict, leaks.reason) == (FAIL, "the worker 0 has 22 open descriptors, and had 15 7 views ago")


def busy(share: float) -> Evidence:
    """The agent computes behind the fault, with nothing to do."""
    common: dict[str, Any] = {"pid": 7, "role": "agent", "members": 2, "threads": 5, "descriptors": 30}
    times = [(50.1, 1.0), (50.7, 1.006), (60.0, 2.0), (61.0, 2.01 + share)]
    return seen(uses=[Use(at=at, cpu_s=cpu_s, **common) for at, cpu_s in times])


def with_late(seconds: float, busy: float = 1.0) -> Evidence:
    """All steps from 12 on come later; other programs compute `busy` seconds."""
    steps = tuple(given(0, step, at=given(0, step).at + (step >= 12) * seconds) for step in range(STEPS))
    known = fine().seen
    return first(fine(seen=Seen(views=known.views, uses=known.uses, machine=[(50.5, 0.0), (72.0, busy)], looks=1)), given=steps)


@pytest.mark.parametrize(("oracle", "spoiled", "reason"), SPOILED, ids=[f"{row[0]}-{place}" for place, row in enumerate(SPOILED)])
def test_what_is_wrong_is_named(oracle: str, spoiled: Callable[[], Evidence], reason: str):
    finding = found(spoiled(), oracle)
    assert finding.verdict == FAIL
    assert reason in finding.reason
    assert verdict_of(judge(spoiled())) == FAIL


def shorter(steps: int, **changes: Any) -> Evidence:
    """The undisturbed run has only so many steps, and may have more."""
    known = fine().reference
    assert known is not None
    losses, norms = known.losses[:steps], known.grad_norms[:steps]
    return fine(reference=replace(known, losses=losses, grad_norms=norms, whole=False), **changes)


NOTHING_TO_JUDGE = [
    ("promises", lambda: seen(read=0), "no worker was seen to do anything"),
    ("one history", lambda: seen(views=[]), "no view was seen"),
    ("one history", lambda: fine(history=()), "no view was seen in etcd's history"),
    ("left behind", lambda: fine(left=Left(unread="Connection refused")), "etcd does not say what is left in it: Connection refused"),
    ("losses", lambda: shorter(15), "the undisturbed run has only 15 steps, and 20 were given"),
    ("handed out once", lambda: shorter(STEPS, last=None), "nothing shows that the undisturbed run does"),
    ("handed out once", lambda: shorter(STEPS, last=30), "nothing shows that the undisturbed run does"),
]


@pytest.mark.parametrize(("oracle", "spoiled", "reason"), NOTHING_TO_JUDGE, ids=[f"{row[0]}-{row[2]}" for row in NOTHING_TO_JUDGE])
def test_where_there_is_nothing_to_judge_from_the_finding_is_unknown(oracle: str, spoiled: Callable[[], Evidence], reason: str):
    finding = found(spoiled(), oracle)
    assert finding.verdict == UNKNOWN
    assert reason in finding.reason


def test_a_kill_before_the_last_view_or_with_a_full_disk_need_not_be_recorded():
    known = fine(incidents=())
    (effect,) = known.effects
    late = replace(effect, hits=[replace(effect.hits[0], epoch=2)])
    full = Effect(parse("disk-full@5"), at=50.5, until=50.9, proof="a write failed", why=None)
    assert found(replace(known, effects=(late,)), "accounts").verdict == PASS
    assert found(replace(known, effects=(effect, full)), "accounts").verdict == PASS


def test_a_script_that_is_not_exact_may_take_steps_again_with_other_last_bits():
    def again(loss: float, exact: bool) -> Finding:
        steps = (given(0, 6, loss=loss), *(given(0, step) for step in range(7, STEPS)))
        second = replace(notes(0, range(6, STEPS), run="b", began=60.0, exact=exact), given=steps)
        return found(fine(workers=(notes(0, range(10), exact=exact), second)), "agreement")

    assert [again(2.4000001, True).verdict, again(2.4000001, False).verdict, again(2.5, False).verdict] == [FAIL, PASS, FAIL]


def test_a_fault_without_proof_makes_the_verdict_unknown():
    evidence = fine(effects=(Effect(parse("kill@8"), at=50.8, why="it had ended"),))
    finding = found(evidence, "took effect")
    assert (finding.verdict, finding.reason) == (UNKNOWN, "kill@8: it had ended")
    assert verdict_of(tuple(each for each in judge(evidence) if each.oracle != "blame")) == UNKNOWN


def late(**changes: Any) -> Effect:
    """A fault that was not due before the job ended."""
    return Effect(parse("kill@900s"), **changes)


@pytest.mark.parametrize("drawn", [False, True])
def test_random_faults_behind_the_end_of_a_script_are_left_out_and_written_ones_make_the_verdict_unknown(drawn: bool):
    known = fine()
    schedule = replace(known.schedule, drawn=drawn)
    finding = found(replace(known, schedule=schedule, effects=(*known.effects, late(), late()), last=None), "took effect")
    assert finding.verdict == (PASS if drawn else UNKNOWN)
    words = (
        "all 1 faults took effect; 2 random ones are left out, since the job had ended after 20 steps before they were due"
        if drawn
        else "kill@900s: the job ended before it was due; kill@900s: the job ended before it was due (the script ended by itself after "
        "20 steps: give earlier faults)"
    )
    assert finding.reason == words


@pytest.mark.parametrize("effects", [(late(),), (late(), late(over=False, why="the byte did not change"))])
def test_random_faults_of_which_none_took_effect_prove_nothing(effects: tuple[Effect, ...]):
    assert found(replace(fine(effects=effects), schedule=replace(fine().schedule, drawn=True)), "took effect").verdict == UNKNOWN


def test_a_fault_that_was_tried_again_says_so_and_may_cost_more():
    known = fine()
    again = replace(known.effects[0], missed=["the replacement was a member already"])
    assert found(replace(known, effects=(again,)), "took effect").reason == "all 1 faults took effect, after 1 that missed their moment"
    assert allowed_s(known, [again]) == pytest.approx(allowed_s(known, [known.effects[0]]) + 0.5 + 2.5)


def test_without_an_undisturbed_run_numbers_are_unknown():
    evidence = fine(reference=None, no_reference="the script fails without faults")
    assert [found(evidence, name).verdict for name in ("losses", "digest")] == [UNKNOWN, UNKNOWN]
    assert "the script fails without faults" in found(evidence, "losses").reason


def test_a_script_that_makes_no_trainer_is_unknown_and_nothing_fails():
    findings = judge(fine(workers=(), incidents=(), last=None))
    assert verdict_of(findings) == UNKNOWN, [each for each in findings if each.verdict == FAIL]
    assert "the job ended without an elastic.Trainer" in next(each.reason for each in findings if each.oracle == "ended")


def test_a_script_that_is_not_repeatable_is_no_failure():
    evidence = with_step(0, loss=1.0)
    assert evidence.reference is not None
    evidence = replace(evidence, reference=replace(evidence.reference, repeatable=False))
    finding = found(evidence, "losses")
    assert finding.verdict == UNKNOWN
    assert "give it a seed" in finding.reason.lower()


def test_a_script_that_is_not_exact_is_compared_within_a_tolerance():
    def inexact(loss: float) -> Finding:
        evidence = with_step(12, loss=loss)
        assert evidence.reference is not None
        return found(first(replace(evidence, reference=replace(evidence.reference, exact=False)), exact=False), "losses")

    assert (inexact(1.8001).verdict, inexact(1.9).verdict) == (PASS, FAIL)
    assert "exact=False" in inexact(1.8001).reason


def test_a_run_of_which_the_watcher_broke_is_unknown():
    finding = found(seen(broken="ZeroDivisionError"), "ended")
    assert (finding.verdict, finding.reason) == (UNKNOWN, "the harness failed: ZeroDivisionError")


def test_steps_that_the_job_disclaims_are_left_out():
    evidence = replace(with_step(12, loss=1.5), incidents=(incident(kind="damage", step=12, went_back_to=11),))
    finding = found(evidence, "losses")
    assert finding.verdict == PASS
    assert "[12] are left out" in finding.reason


def test_a_long_stall_on_a_machine_that_others_use_is_unknown():
    finding = found(with_late(20.0, busy=30.0), "stalls")
    assert finding.verdict == UNKNOWN
    assert "other programs" in finding.reason


def test_a_job_that_stood_still_on_a_machine_that_others_use_is_unknown():
    known = fine().seen

    def finding(busy: float) -> Finding:
        machine = [(fine().ended - 25.0, 0.0), (fine().ended, busy)]
        seen = Seen(views=known.views, uses=known.uses, machine=machine, looks=1)
        return found(fine(stuck="the job made no step for 120 s", seen=seen), "ended")

    assert [finding(2.0).verdict, finding(20.0).verdict] == [FAIL, UNKNOWN]
    assert "no step for 120 s while other programs took the processors" in finding(20.0).reason


def test_a_job_that_broke_on_a_machine_that_others_use_is_unknown():
    known = fine().seen

    def finding(busy: float) -> Finding:
        return found(
            fine(workers=AGAIN, seen=Seen(views=known.views, uses=known.uses, machine=[(50.0, 0.0), (54.0, busy)], looks=1)), "ended"
        )

    assert [finding(0.5).verdict, finding(3.9).verdict] == [FAIL, UNKNOWN]


def test_a_job_that_every_host_left_may_be_started_again_from_its_checkpoint():
    fault = parse("agent-kill@8")
    schedule = Schedule(job=JobSpec(workers=2, steps=STEPS, checkpoint_every=3), injections=(fault,))
    effect = Effect(fault, at=50.8, until=50.9, hits=[Hit(worker=0), Hit(worker=1)], proof="it died", why=None, others=0)
    evidence = fine(schedule=schedule, effects=(effect,), workers=AGAIN, hosts=(HostEnd(number=0, codes=(75, 0), log=""),))
    assert [found(evidence, name).verdict for name in ("ended", "handed out once", "losses", "digest")] == [PASS] * 4


def test_who_acts_for_an_epoch_after_its_inventory_for_the_next_is_found():
    promises = Promises()

    def look(phase: str, epoch: int) -> str | None:
        return promises.look(Doing(worker=1, pid=5, phase=phase, step=3, epoch=epoch, at=float(epoch)))

    assert [look("apply", 1), look("quiesce", 1), look("propose", 1), look("migrate", 1), look("apply", 2)] == [None] * 5
    assert look("migrate", 2) is None
    assert "worker 1 was in gather of step 3 for epoch 2, after its inventory for the next" in str(look("gather", 2))
