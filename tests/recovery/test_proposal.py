"""Tests proposals: the members, the step, the transfers, and that they pass the gate."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.errors import CopiesConflict, CoverageLost, GateRefused, MismatchError, StateUnproven
from elastic.layout.transfer import PARAM, Transfer, minimum_elements
from elastic.plan.memory import readable
from elastic.plan.moving import moving
from elastic.recovery.checkpoint_fallback import Checkpoint
from elastic.recovery.gate import check_proposal
from elastic.recovery.inventory import Inventory, Progress
from elastic.recovery.proposal import Proposal, bytes_moved, fall_back, holdings_at, propose
from elastic.view import View
from tests.recovery.recovering import STATES, inventories_of, member, view_of

LAST = view_of([0, 1, 2, 3], stages=2)


def after_loss(*lost: int, last: View = LAST, joined=(), step: int = 5, ahead=(), stages: int | None = 2) -> Proposal:
    left = inventories_of(last, [worker for worker in last.workers if worker not in lost], step, ahead)
    return propose(last=last, attempt=2, inventories=left, joiners={worker: member(worker) for worker in joined}, stages=stages)


def test_a_loss():
    found = after_loss(1)
    assert (found.view.epoch, found.view.attempt) == (4, 2)
    assert found.view.workers == (0, 2, 3)
    assert found.view.coordinator == 0
    assert found.resume == 5
    assert found.states == STATES
    assert found.progress == Progress(step=5, apply={"clip": 1.0, "loss": 0.5}, groups=[{"lr": 0.1}])
    assert set(found.scalars) == {f"{i}.w" for i in range(4)}
    assert found.why.startswith("worker 1 (place 1) left: going on after step 5 as [0-2]x2 [3-3]x1")


def test_a_loss_and_a_join():
    found = after_loss(0, joined=(7, 5))
    assert found.view.workers == (1, 2, 3, 5, 7)
    assert found.why.startswith("worker 0 (place 0) left, worker 5 and worker 7 joined: going on after step 5")
    assert not {move.source for move in found.transfers} & {0, 5, 7}
    check_proposal(found, LAST)


def test_workers_that_were_ahead_fall_back_to_their_spares():
    assert after_loss(1, ahead=(0, 2)).resume == 5


def test_fewer_workers_than_stages_are_fewer_stages():
    last = view_of([0, 1, 2], stages=3)
    found = after_loss(1, last=last, stages=3)
    assert len(found.view.plan.stages) == 2
    check_proposal(found, last)


def test_the_initial_state_has_no_optimizer():
    found = after_loss(2, step=-1)
    assert (found.resume, found.states, found.scalars, found.progress) == (-1, {}, {}, None)
    assert {move.state for move in found.transfers} <= {PARAM}
    assert "going on from the initial state" in found.why
    check_proposal(found, LAST)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_proposal_is_minimal_and_passes_the_gate(data):
    last = view_of(
        data.draw(st.lists(st.integers(0, 30), min_size=2, max_size=6, unique=True)),
        layers=data.draw(st.integers(1, 5)),
        blocks=data.draw(st.integers(0, 12)),
        hosts=data.draw(st.sampled_from([("a",), ("a", "b"), ("a", "b", "c")])),
    )
    for epoch in range(data.draw(st.integers(1, 3))):
        workers = last.workers
        lost = {data.draw(st.sampled_from(workers))} if len(workers) > 1 and data.draw(st.booleans()) else set()
        joined = data.draw(st.sets(st.integers(100 * epoch + 100, 100 * epoch + 105), max_size=2))
        step = data.draw(st.integers(-1, 3))
        left = inventories_of(last, [worker for worker in workers if worker not in lost], step)
        joiners = {worker: member(worker, "b") for worker in joined}
        found = propose(last=last, attempt=1, inventories=left, joiners=joiners, stages=data.draw(st.sampled_from([None, 1])))
        assert found.resume == step
        check_proposal(found, last)
        check_proposal(found, None)
        for inventory in left.values():
            check_proposal(found, last, inventory)
        model = found.view.layout.model
        assert bytes_moved(model, found.transfers, found.states) == found.bytes_minimum
        held = holdings_at(left.values(), step, list(found.states))
        sizes = {PARAM: 2, "exp_avg": 2, "exp_avg_sq": 4}
        least = sum(sizes[state] * minimum_elements(held, found.view.layout, [state]) for state in [PARAM, *found.states])
        assert found.bytes_minimum == least
        assert Proposal.from_json(json.loads(json.dumps(found.to_json()))) == found
        last = found.view


@pytest.mark.parametrize(("workers", "stages", "layers"), [(2, 2, 4), (4, 1, 4), (4, 2, 4), (6, 3, 6), (8, 2, 8), (3, 3, 6)])
def test_the_planner_expects_about_what_moves(workers, stages, layers):
    last = view_of(list(range(workers)), layers=layers, blocks=40, stages=stages)
    costs = tuple(
        replace(each, parameters=spec.size, item_bytes=2) for each, spec in zip(last.workload.layers, last.layout.model.layers, strict=True)
    )
    last = replace(last, workload=replace(last.workload, layers=costs, state_bytes=6.0))
    for lost in last.workers:
        found = after_loss(lost, last=last, stages=stages)
        expected = moving(last.plan, found.view.plan.stages, last.workload, found.view.fleet).bytes
        assert 0.7 * found.bytes_minimum <= expected <= 1.3 * found.bytes_minimum
        assert f"about {readable(expected)} move" in found.planned


def with_changed(worker: int, **changes):
    left = inventories_of(LAST, LAST.workers)
    left[worker] = replace(left[worker], **changes)
    return propose(last=LAST, attempt=1, inventories=left, joiners={}, stages=2)


def test_scalars_that_differ_are_a_conflict():
    name = "0.w"
    assert {name: {"step": 6.0}}.items() <= inventories_of(LAST, [0])[0].scalars[5].items()
    with pytest.raises(CopiesConflict, match=r"'step' of parameter '0.w' at step 5 is 6.0 on worker 0 and 7.0 on worker 1"):
        with_changed(1, scalars={5: {name: {"step": 7.0}}})


def test_decisions_that_differ_are_a_conflict():
    with pytest.raises(CopiesConflict, match=r"the decision of step 5 was .* on worker 0 and .* on worker 3"):
        with_changed(3, progress={5: Progress(step=5, apply={"clip": 0.5})})


def test_dtypes_are_merged_or_conflict():
    assert with_changed(0, states={"exp_avg": "same", "exp_avg_sq": "same"}).states == STATES
    with pytest.raises(CopiesConflict, match="'exp_avg_sq' has dtype float64 on worker 0 and float32 on worker 1"):
        with_changed(0, states={"exp_avg_sq": "float64"})


def test_results_of_all_survivors_are_kept_by_number():
    assert with_changed(2, results=[[3, 0.5], [4, [1.0, 2.0]]]).results == [[3, 0.5], [4, [1.0, 2.0]]]


def test_progress_comes_from_whoever_has_it():
    left = {worker: replace(found, progress={}) for worker, found in inventories_of(LAST, LAST.workers).items()}
    kept = Progress(step=5, apply={"clip": 3.0})
    left[2] = replace(left[2], progress={5: kept, 4: Progress(step=4, apply={})})
    assert propose(last=LAST, attempt=1, inventories=left, joiners={}, stages=2).progress == kept


def test_the_loss_of_a_skipped_step_is_no_conflict():
    """It is NaN, which equals nothing: a death behind such a step ended the job."""
    left = inventories_of(LAST, LAST.workers[:3])
    for worker, inventory in left.items():
        left[worker] = replace(inventory, progress={5: Progress(step=5, apply={"loss": float("nan"), "skipped": "nothing"})})
    found = propose(last=LAST, attempt=1, inventories=left, joiners={}, stages=2)
    assert found.progress is not None
    assert found.progress.apply is not None
    assert found.progress.apply["skipped"] == "nothing"


def test_progress_is_from_before_the_loop_body_where_somebody_knows_that():
    left = inventories_of(LAST, LAST.workers)
    before = Progress(step=5, apply={"clip": 1.0, "loss": 0.5}, groups=[{"lr": 0.2}], body=False)
    left[3] = replace(left[3], progress={5: before})
    assert propose(last=LAST, attempt=1, inventories=left, joiners={}, stages=2).progress == before


def test_whoever_joins_goes_on_behind_the_newest_step_whose_loop_body_is_over_on_all():
    left = {worker: replace(found, yielded=5, changes=[-1, []]) for worker, found in inventories_of(LAST, LAST.workers).items()}
    joiners = {9: member(9, "b")}

    def seen_with(**changes):
        changed = {**left, 2: replace(left[2], **changes)}
        found = propose(last=LAST, attempt=1, inventories=changed, joiners=joiners, stages=2)
        assert Proposal.from_json(json.loads(json.dumps(found.to_json()))) == found
        assert found.changes == [[-1, []]] * len(left)
        return found.seen

    assert seen_with() == 5
    assert seen_with(yielded=4) == 4
    assert seen_with(amid=True) == 4
    assert propose(last=LAST, attempt=1, inventories=left, joiners={}, stages=2).changes == [], "survivors remember their own"


def test_nobody_and_strangers_are_refused():
    with pytest.raises(CoverageLost, match="no worker of epoch 3 is left"):
        propose(last=LAST, attempt=1, inventories={}, joiners={}, stages=2)
    with pytest.raises(MismatchError, match="9"):
        propose(last=LAST, attempt=1, inventories={9: inventories_of(LAST, [0])[0]}, joiners={}, stages=2)


def test_losing_an_owner_and_its_replica_is_refused():
    interval = LAST.layout.layers[0].intervals[0]
    with pytest.raises(CoverageLost, match=r"layer 0 \[0, "):
        after_loss(interval.owner, *interval.replicas)


def test_eight_workers_and_twenty_four_layers_move_the_least():
    last = view_of(list(range(8)), layers=24, blocks=200, stages=4)
    left = inventories_of(last, range(1, 8))
    found = propose(last=last, attempt=1, inventories=left, joiners={}, stages=4)
    assert bytes_moved(last.layout.model, found.transfers, found.states) == found.bytes_minimum > 0


def seen(inventory, steps: int, epoch: int = 1):
    return replace(inventory, checkpoint=Checkpoint(order=(steps, epoch, 1), name=f"step-{steps:08d}"))


def fallen(**changes):
    """All who are left begin with a checkpoint, and worker 9 with them."""
    left = {worker: seen(inventory, 3 + worker) for worker, inventory in inventories_of(LAST, LAST.workers[:2]).items()}
    left[9] = Inventory(worker=9, yielded=-1, copies=())
    found = fall_back(last=LAST, attempt=2, inventories=left, joiners={9: member(9, "b")}, stages=2)
    return replace(found, **changes)


def test_the_newest_checkpoint_that_anybody_sees_is_begun_with():
    found = fallen()
    assert found.restore == Checkpoint(order=(4, 1, 1), name="step-00000004")
    assert (found.resume, found.yielded, found.seen, found.transfers, found.bytes_minimum) == (3, 4, 4, (), 0)
    assert found.view.workers == (*LAST.workers[:2], 9)
    assert Proposal.from_json(json.loads(json.dumps(found.to_json()))) == found
    check_proposal(found, LAST)
    check_proposal(found, None)
    check_proposal(found, LAST, inventories_of(LAST, [0])[0])


def test_what_somebody_found_damaged_is_not_begun_with():
    left = {worker: seen(inventory, 3 + worker) for worker, inventory in inventories_of(LAST, LAST.workers[:2]).items()}
    left[0] = replace(left[0], unreadable=("step-00000004", "step-00000009"))
    assert Inventory.from_json(json.loads(json.dumps(left[0].to_json()))) == left[0]
    found = fall_back(last=LAST, attempt=2, inventories=left, joiners={}, stages=2)
    assert found.restore == Checkpoint(order=(3, 1, 1), name="step-00000003")
    left[1] = replace(left[1], unreadable=("step-00000003",))
    with pytest.raises(CoverageLost, match=r"is left \(step-00000003, step-00000004, step-00000009: damaged\)"):
        fall_back(last=LAST, attempt=2, inventories=left, joiners={}, stages=2)


def test_nobody_has_to_survive_for_that():
    joiners = {8: member(8, "a"), 9: member(9, "b")}
    left = {worker: seen(Inventory(worker=worker, yielded=-1, copies=()), 7) for worker in joiners}
    found = fall_back(last=LAST, attempt=1, inventories=left, joiners=joiners, stages=1)
    check_proposal(found, LAST)
    assert (found.view.workers, found.resume, found.yielded, found.seen) == ((8, 9), 6, -1, 6)


def test_a_checkpoint_of_a_step_at_which_copies_differed_is_not_begun_with():
    left = {worker: seen(inventory, 4) for worker, inventory in inventories_of(LAST, [0]).items()}
    assert fall_back(last=LAST, attempt=1, inventories=left, joiners={}, stages=1, back=3).resume == 3
    with pytest.raises(StateUnproven, match=r"step-00000004, is of step 3, so it may be wrong\. Start again from one of step 2 or before"):
        fall_back(last=LAST, attempt=1, inventories=left, joiners={}, stages=1, back=2)


def test_copies_that_differ_lead_back_to_those_that_were_kept():
    """Worker 1 has another previous copy of a run than worker 2 has a replica, and all have kept the state of step 1."""
    found = {}
    for worker, inventory in inventories_of(LAST, LAST.workers).items():
        kept = [replace(copy, step=1, role="kept") for copy in inventory.copies if copy.role in ("live", "previous")]
        progress = {**inventory.progress, 1: Progress(step=1, apply={"clip": 1.0}, groups=[{"lr": 0.3}])}
        scalars = {**inventory.scalars, 1: {name: {"step": 2.0} for values in inventory.scalars.values() for name in values}}
        digested = [replace(copy, digest=f"of worker {worker}") if copy.full and copy.layer == 0 else copy for copy in inventory.copies]
        found[worker] = replace(inventory, copies=(*digested, *kept), progress=progress, scalars=scalars)
    proposal = propose(last=LAST, attempt=1, inventories=found, joiners={}, stages=2)
    assert proposal.conflicts
    assert (proposal.resume, proposal.back) == (1, min(each.step for each in proposal.conflicts) - 1)
    assert proposal.progress is not None
    assert proposal.progress.groups == [{"lr": 0.3}]
    assert Proposal.from_json(json.loads(json.dumps(proposal.to_json()))).back == proposal.back
    for worker, inventory in found.items():
        check_proposal(proposal, LAST, inventory)
        with pytest.raises(GateRefused, match="copies of steps after 0 differ, and the proposal resumes at step 1"):
            check_proposal(replace(proposal, back=0), LAST, inventory)
        with pytest.raises(GateRefused, match="cannot go back to the state after step 1"):
            check_proposal(replace(proposal, back=None), LAST, replace(inventory, yielded=9))
        assert worker in proposal.view.workers


def test_without_a_checkpoint_there_is_nothing_to_fall_back_to():
    with pytest.raises(CoverageLost, match="no good checkpoint has been saved yet"):
        fall_back(last=LAST, attempt=1, inventories=inventories_of(LAST, [0]), joiners={}, stages=1)


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        pytest.param({"resume": 2}, "restore", id="of another step"),
        pytest.param({"states": STATES}, "restore", id="states"),
        pytest.param({"scalars": {"0.w": {"step": 1.0}}}, "restore", id="scalars"),
        pytest.param({"progress": Progress(step=3, apply=None)}, "restore", id="progress"),
        pytest.param({"transfers": (Transfer(source=0, destination=1, state=PARAM, layer=0, start=0, stop=64),)}, "transfers", id="moves"),
        pytest.param({"restore": None}, "transfers", id="from nowhere"),
    ],
)
def test_what_is_wrong_with_a_way_back_is_refused(changes, check):
    with pytest.raises(GateRefused, match=rf"^{check}: "):
        check_proposal(fallen(**changes), LAST)


def test_steps_that_are_taken_again_may_be_given_up():
    """They were yielded, but the worker has passed them: another loss does not lead to the checkpoint again."""
    left = {worker: replace(found, yielded=9, rewound=True) for worker, found in inventories_of(LAST, LAST.workers).items()}
    found = propose(last=LAST, attempt=1, inventories=left, joiners={}, stages=2)
    assert (found.resume, found.yielded) == (5, 9)
    check_proposal(found, LAST, left[0])
    with pytest.raises(CoverageLost, match="step 8 was complete everywhere"):
        propose(last=LAST, attempt=1, inventories={**left, 0: replace(left[0], rewound=False)}, joiners={}, stages=2)
