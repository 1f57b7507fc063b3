"""Tests which grains of an interrupted step count: those that all stages hold on the worker that will compute them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.errors import GateRefused
from elastic.recovery.gate import check_proposal
from elastic.recovery.inventory import FinishedGrains, Inventory
from elastic.recovery.proposal import Proposal, propose
from elastic.recovery.salvage import Restart, restart, usable
from tests.recovery.recovering import inventories_of, view_of

LAST = view_of([0, 1, 2, 3], stages=2)
GRAINS = LAST.workload.grains


def routed(worker: int) -> tuple[int, ...]:
    route = LAST.plan.routes[LAST.plan.stage_of(worker)]
    return tuple(grain for grain, to in enumerate(route) if to == worker)


def finished(worker: int, *lacking: int, step: int = 6) -> FinishedGrains:
    layers = LAST.plan.stages[LAST.plan.stage_of(worker)].layers
    return FinishedGrains(step=step, layers=layers, grains=tuple(set(routed(worker)).difference(lacking)), summed=routed(worker))


def inventories(*left: int, lacking: tuple[int, ...] = (), step: int = 6) -> dict[int, Inventory]:
    """At step 5, with all but the `lacking` grains of `step` finished."""
    return {w: replace(inventory, finished=(finished(w, *lacking, step=step),)) for w, inventory in inventories_of(LAST, left).items()}


def proposal(found: dict[int, Inventory]) -> Proposal:
    return propose(last=LAST, attempt=1, inventories=found, joiners={}, stages=2, brief=True)


def test_finished_grains_without_any_gradient_stay_where_their_losses_are():
    """Sums cover nothing there; a route that gives them to another member would find no loss."""
    last = view_of([0, 1, 2, 3, 4], stages=2)
    routes = {worker: last.plan.routes[last.plan.stage_of(worker)] for worker in last.workers}
    mine = {worker: tuple(grain for grain, to in enumerate(route) if to == worker) for worker, route in routes.items()}
    found = {
        worker: replace(
            inventory,
            finished=(
                FinishedGrains(
                    step=6,
                    layers=last.plan.stages[last.plan.stage_of(worker)].layers,
                    grains=mine[worker],
                    summed=mine[worker] if last.plan.stage_of(worker) == 0 else (),
                ),
            ),
        )
        for worker, inventory in inventories_of(last, (0, 1, 2, 3, 4)).items()
    }
    again = restart(last, 6, found)
    assert again.finished == tuple(range(last.workload.grains))
    assert all(usable(last, again.routes, found[worker], 6) for worker in last.workers)
    uneven = replace(last, plan=replace(last.plan, routes=tuple(tuple(reversed(route)) for route in last.plan.routes)))
    again = restart(uneven, 6, found)
    assert all(again.routes[last.plan.stage_of(worker)][grain] == worker for worker in last.workers for grain in mine[worker])


def test_the_grains_of_those_who_stay_are_not_computed_again():
    found = inventories(0, 2, 3)
    made = proposal(found)
    assert made.view.plan.summary == "[0-1]x1 [2-3]x2"
    assert made.finished == routed(0)
    assert set(made.finished) < set(range(GRAINS))
    for inventory in found.values():
        check_proposal(made, LAST, inventory)
    assert Proposal.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert Inventory.from_json(json.loads(json.dumps(found[0].to_json()))) == found[0]


@given(st.sets(st.integers(0, GRAINS - 1)), st.sampled_from([0, 1, 2, 3]))
def test_a_grain_counts_if_every_stage_has_it(lacking, lost):
    left = [worker for worker in LAST.workers if worker != lost]
    made = proposal(inventories(*left, lacking=tuple(lacking)))
    assert made.finished == tuple(grain for grain in range(GRAINS) if grain not in lacking and grain not in routed(lost))


def test_another_step_is_of_no_use():
    assert proposal(inventories(0, 2, 3, step=5)).finished == ()


def test_a_joiner_has_nothing_and_nobody_has_if_layers_move():
    found = inventories(0, 2, 3)
    view = proposal(found).view
    routes = view.plan.routes
    assert not usable(view, routes, replace(found[0], worker=9), 6)
    other = replace(found[0], finished=(replace(finished(0), layers=range(1)),))
    assert not usable(view, routes, other, 6)
    assert restart(view, 6, {**found, 0: other}) == Restart(routes=routes)


def test_a_sum_that_covers_the_grain_of_another_is_of_no_use():
    found = inventories(0, 2, 3)
    view = proposal(found).view
    mixed = {**found, 3: replace(found[3], finished=(replace(finished(3), summed=tuple(range(GRAINS))),))}
    made = restart(view, 6, mixed)
    assert usable(view, made.routes, mixed[2], 6)
    assert not usable(view, made.routes, mixed[3], 6)


def test_the_sums_of_a_dead_worker_go_to_a_member_of_its_stage_on_its_host():
    found = inventories(0, 2, 3)
    view = proposal(found).view
    offers = [replace(inventories(1)[1], copies=())]
    made = restart(view, 6, found, offers, {1: "host"})
    assert made.heirs == ((1, 0),)
    assert made.finished == tuple(range(GRAINS))
    assert made.routes[0] == (0,) * GRAINS
    elsewhere = restart(view, 6, found, offers, {1: "another"})
    assert elsewhere.heirs == ()
    assert elsewhere.finished == routed(0)


def test_what_is_left_of_the_step_is_shared_evenly():
    """Of the stage of two members the third has finished all its grains; those of the first have to be computed again."""
    found = inventories(0, 2, 3)
    view = proposal(found).view
    found[2] = replace(found[2], finished=())
    made = restart(view, 6, found)
    assert set(made.finished) == set(routed(0)) & set(routed(3))
    rest = [worker for grain, worker in enumerate(made.routes[1]) if grain not in made.finished and grain not in routed(3)]
    assert abs(rest.count(2) - rest.count(3)) <= len([grain for grain in routed(3) if grain not in made.finished]) + 1
    assert [made.routes[1][grain] for grain in routed(3)] == [3] * len(routed(3))


@pytest.mark.parametrize("claimed", [routed(1)[:1], (GRAINS,), (-1,)])
def test_the_gate_refuses_grains_that_are_not_there(claimed):
    found = inventories(0, 2, 3)
    made = replace(proposal(found), finished=claimed)
    with pytest.raises(GateRefused, match=r"^salvage: "):
        check_proposal(made, LAST, found[0])


def test_the_gate_refuses_a_proposal_of_another_worker_that_forgot():
    found = inventories(0, 2, 3)
    made = proposal(found)
    with pytest.raises(GateRefused, match=r"grains .* of step 6 are listed as finished, but worker 0 has no usable sums"):
        check_proposal(made, LAST, replace(found[0], finished=()))
