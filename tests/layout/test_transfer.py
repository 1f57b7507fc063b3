"""Tests transfers: minimal, sufficient, sent by workers that have the run, and refused if none has it."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layout_strategies import STATES, UNIT, Held, few, fewest_elements, held, layouts, models, units, wanted, worker_lists

from elastic.errors import CoverageLost
from elastic.layout.invariants import check
from elastic.layout.layout import Interval, LayerLayout, Layout, spread
from elastic.layout.regions import BLOCK, LayerSpec, ModelSpec
from elastic.layout.runs import missing
from elastic.layout.transfer import PIECE, Holding, Role, Transfer, holdings_of, minimum_elements, needs, transfers


def apply(have: Held, moves: tuple[Transfer, ...], want: Held) -> Held:
    """Carries out the moves; each must send what its source had before, and bring what its destination needs and does not have."""
    after = {key: set(run) for key, run in have.items()}
    for move in moves:
        run = units(move.start, move.stop)
        place = (move.destination, move.state, move.layer)
        assert run
        assert run <= have.get((move.source, move.state, move.layer), set())
        assert run <= want[place]
        assert not run & after.setdefault(place, set())
        after[place] |= run
    return after


def assert_sufficient(have: Held, want: Held) -> None:
    assert all(run <= have.get(key, set()) for key, run in want.items())


@few
@given(layouts())
def test_needs_say_what_the_promise_says(layout):
    found = needs(layout, STATES)
    assert held(found) == wanted(layout, STATES)
    gathered = [need for need in found if need.role == "gathered"]
    assert sum(need.stop - need.start for need in gathered) == UNIT * sum(len(run) for run in held(gathered).values())


@few
@given(st.data())
def test_transfers_are_minimal_and_sufficient_between_any_layouts(data):
    model = data.draw(models())
    old, new = data.draw(layouts(model)), data.draw(layouts(model))
    holdings = holdings_of(old, STATES, old.workers)
    moves = transfers(holdings, new, STATES)
    have, want = held(holdings), wanted(new, STATES)
    assert_sufficient(apply(have, moves, want), want)
    least = fewest_elements(have, want)
    assert sum(move.elements for move in moves) == least
    assert minimum_elements(holdings, new, STATES) == least


@few
@given(st.data())
def test_there_and_back_again(data):
    model = data.draw(models())
    old, new = data.draw(layouts(model)), data.draw(layouts(model))
    have, want_old, want_new = held(holdings_of(old, STATES, old.workers)), wanted(old, STATES), wanted(new, STATES)
    apply(have, transfers(holdings_of(old, STATES, old.workers), new, STATES), want_new)
    back = apply(want_new, transfers(holdings_of(new, STATES, new.workers), old, STATES), want_old)
    assert_sufficient(back, want_old)
    kept = [*holdings_of(old, STATES, old.workers), *holdings_of(new, STATES, new.workers)]
    assert transfers(kept, old, STATES) == ()
    assert transfers(holdings_of(old, STATES, old.workers), old, STATES) == ()


@few
@given(st.data())
def test_any_sequence_of_single_losses_and_joins_keeps_everything(data):
    model = data.draw(models(most_layers=4))
    workers = data.draw(worker_lists)
    layout = data.draw(layouts(model, workers))
    for epoch in range(data.draw(st.integers(1, 4))):
        alive = list(layout.workers)
        if len(alive) > 1 and data.draw(st.booleans()):
            alive.remove(data.draw(st.sampled_from(alive)))
        holdings = holdings_of(layout, STATES, alive)
        joined = [1000 + epoch] if data.draw(st.booleans()) else []
        members = data.draw(st.permutations([*alive, *joined]))
        layout = data.draw(layouts(model, members))
        check(layout)
        want = wanted(layout, STATES)
        assert_sufficient(apply(held(holdings), transfers(holdings, layout, STATES), want), want)


def one_layer(size: int, *owners: tuple[int, int, int, int | None], members: tuple[int, ...]) -> Layout:
    model = ModelSpec(layers=(LayerSpec.build(0, [("weight", (size,), "float32")]),))
    intervals = tuple(
        Interval(start=start, stop=stop, owner=owner, replicas=() if replica is None else (replica,))
        for start, stop, owner, replica in owners
    )
    return Layout(model=model, layers=(LayerLayout(layer=0, members=members, intervals=intervals),))


def holding(worker: int, role: Role, start: int = 0, stop: int = BLOCK, state: str = "exp_avg") -> Holding:
    return Holding(worker=worker, state=state, layer=0, start=start, stop=stop, role=role)


@pytest.mark.parametrize(
    ("roles", "source"),
    [
        ({2: "replica", 3: "previous", 4: "live"}, 4),
        ({2: "replica", 3: "previous"}, 3),
        ({2: "replica"}, 2),
        ({2: "replica", 3: "gathered"}, 3),
    ],
)
def test_sources_are_taken_in_order_of_freshness(roles, source):
    layout = one_layer(BLOCK, (0, BLOCK, 1, None), members=(1,))
    moves = transfers([holding(worker, role) for worker, role in roles.items()], layout, ["exp_avg"])
    assert moves == (Transfer(source=source, destination=1, state="exp_avg", layer=0, start=0, stop=BLOCK),)


def test_a_fresher_source_takes_over_where_it_begins():
    layout = one_layer(3 * BLOCK, (0, 3 * BLOCK, 1, None), members=(1,))
    offers = [holding(2, "replica", 0, 3 * BLOCK), holding(3, "live", BLOCK, 2 * BLOCK)]
    moves = transfers(offers, layout, ["exp_avg"])
    assert [(m.source, m.start, m.stop) for m in moves] == [(2, 0, BLOCK), (3, BLOCK, 2 * BLOCK), (2, 2 * BLOCK, 3 * BLOCK)]


def test_equal_sources_share_the_work():
    size = 30 * PIECE
    layout = one_layer(size, (0, size, 0, 1), members=(0, 1, 2, 3, 4))
    offers = [holding(worker, "gathered", 0, size, "param") for worker in (0, 1, 2)]
    sent = Counter()
    for move in transfers(offers, layout, ["param"]):
        sent[move.source] += move.elements
    assert set(sent) == {0, 1, 2}
    assert max(sent.values()) - min(sent.values()) <= PIECE


def test_neighbouring_runs_of_one_source_are_one_transfer():
    layout = one_layer(2 * BLOCK, (0, 2 * BLOCK, 1, None), members=(1,))
    offers = [holding(2, "live", 0, BLOCK), holding(2, "live", BLOCK, 2 * BLOCK)]
    assert len(transfers(offers, layout, ["exp_avg"])) == 1


@pytest.mark.parametrize(
    ("offers", "run"),
    [
        ([], "0, 12288"),
        ([holding(2, "live", 0, BLOCK)], "4096, 12288"),
        ([holding(2, "live", 0, BLOCK), holding(3, "replica", 2 * BLOCK, 3 * BLOCK)], "4096, 8192"),
        ([holding(2, "live", 0, 3 * BLOCK, state="exp_avg_sq")], "0, 12288"),
    ],
)
def test_a_run_that_nobody_holds_is_named(offers, run):
    layout = one_layer(3 * BLOCK, (0, 3 * BLOCK, 1, None), members=(1,))
    with pytest.raises(CoverageLost, match=rf"'exp_avg' of layer 0, run \[{run}\)"):
        transfers(offers, layout, ["exp_avg"])


def test_losing_an_owner_and_its_replica_is_losing_state():
    layout = spread(ModelSpec(layers=(LayerSpec.build(0, [("weight", (9 * BLOCK,), "float32")]),)), [(range(1), (0, 1, 2))])
    lost = {layout.layers[0].intervals[1].owner, *layout.layers[0].intervals[1].replicas}
    (runtime,) = set(layout.workers) - lost
    after = spread(layout.model, [(range(1), (runtime,))])
    assert sum(move.elements for move in transfers(holdings_of(layout, ["param"], [runtime]), after, ["param"])) == 0
    with pytest.raises(CoverageLost, match="exp_avg"):
        transfers(holdings_of(layout, ["exp_avg"], [runtime]), after, ["exp_avg"])


runs = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 8)).map(lambda run: (run[0], run[0] + run[1])), max_size=5).map(sorted)


@given(runs, runs)
def test_missing_is_the_difference_of_unions(wanted_runs, had_runs):
    found = missing(wanted_runs, had_runs)
    expected = {x for run in wanted_runs for x in range(*run)} - {x for run in had_runs for x in range(*run)}
    assert sorted(x for run in found for x in range(*run)) == sorted(expected)
    assert found == sorted(found)
    assert all(start < stop for start, stop in found)


@few
@given(layouts())
def test_json_round_trips(layout):
    holdings = holdings_of(layout, STATES, layout.workers[:1])
    assert tuple(Holding.from_json(json.loads(json.dumps(h.to_json()))) for h in holdings) == holdings
    moves = transfers(holdings_of(layout, STATES, layout.workers), spread(layout.model, [(range(layout.model.depth), (99,))]), STATES)
    assert tuple(Transfer.from_json(json.loads(json.dumps(m.to_json()))) for m in moves) == moves
    assert all(str(m) == f"{m.source}>{m.destination} {m.state} {m.layer}[{m.start}:{m.stop}]" for m in moves)
    assert UNIT * sum(len(run) for run in held(holdings).values()) <= sum(h.stop - h.start for h in holdings)
