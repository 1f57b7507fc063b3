"""Tests against brute force that relabelling moves the least state, and that the chosen senders are the fastest."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations, permutations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_strategies import few

from elastic.errors import PlanError
from elastic.plan.assignment import assign
from elastic.plan.plan import Plan, Stage
from elastic.plan.relabel import ByteRange, relabel
from elastic.plan.routing import even_routes
from elastic.plan.sending import Lacking, Send, balance, missing

Held = dict[int, list[ByteRange]]


@st.composite
def pieces(draw, layers: int = 2, longest: int = 12) -> list[ByteRange]:
    found = []
    for layer in range(layers):
        edges = sorted(draw(st.sets(st.integers(0, longest), max_size=4)))
        found += [ByteRange(layer, start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=False)]
    return found


def bytes_of(some: list[ByteRange]) -> set[tuple[int, int]]:
    return {(piece.layer, byte) for piece in some for byte in range(piece.start, piece.stop)}


@pytest.mark.slow
@few
@given(st.data())
def test_no_permutation_keeps_more(data):
    workers = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=5, unique=True))
    held = {worker: data.draw(pieces()) for worker in workers}
    slots = data.draw(st.lists(pieces(), min_size=1, max_size=len(workers)))
    found = relabel(held, slots)
    assert len(set(found.workers)) == len(slots)
    kept = [len(bytes_of(slot) & bytes_of(held[worker])) for slot, worker in zip(slots, found.workers, strict=True)]
    best = max(
        sum(len(bytes_of(slot) & bytes_of(held[worker])) for slot, worker in zip(slots, order, strict=True))
        for order in permutations(workers, len(slots))
    )
    assert sum(kept) == found.kept_bytes == best
    assert found.moved_bytes == sum(len(bytes_of(slot)) for slot in slots) - best


@few
@given(st.data())
def test_whole_layers_agree_with_the_ordered_assignment(data):
    layers = data.draw(st.integers(1, 6))
    weights = data.draw(st.lists(st.integers(1, 9), min_size=layers, max_size=layers))

    def stages(workers: list[int]) -> tuple[Stage, ...]:
        depth = data.draw(st.integers(1, min(layers, len(workers), 3)))
        cuts = [0, *range(1, depth), layers]
        widths = [1] * (depth - 1) + [len(workers) - depth + 1]
        rest = iter(workers)
        return tuple(Stage(layers=range(cuts[i], cuts[i + 1]), members=tuple(next(rest) for _ in range(widths[i]))) for i in range(depth))

    def plan(workers: list[int]) -> Plan:
        made = stages(workers)
        return Plan(stages=made, routes=tuple(even_routes(2, stage.members) for stage in made), step_s=1.0, why="test")

    old, new = (
        plan(list(range(data.draw(st.integers(1, 6))))),
        plan(data.draw(st.lists(st.integers(0, 8), min_size=1, max_size=6, unique=True))),
    )

    def whole(of: Plan) -> Held:
        return {worker: [ByteRange(layer, 0, weights[layer]) for layer in stage.layers] for stage in of.stages for worker in stage.members}

    had = whole(old)
    found = relabel({worker: had.get(worker, []) for worker in new.workers}, list(whole(new).values()))
    chosen = whole(assign(new, old, weights))
    assert found.kept_bytes == sum(len(bytes_of(some) & bytes_of(had.get(worker, []))) for worker, some in chosen.items())


def test_who_stays_keeps_its_interval_and_a_joiner_takes_what_is_left():
    held = {0: [ByteRange(0, 0, 50)], 1: [ByteRange(0, 50, 100)], 7: []}
    found = relabel(held, [[ByteRange(0, 50, 100)], [ByteRange(1, 0, 10)], [ByteRange(0, 0, 50)]])
    assert found.workers == (1, 7, 0)
    assert (found.kept_bytes, found.moved_bytes) == (100, 10)


@pytest.mark.parametrize(
    ("held", "slots", "message"),
    [
        ({0: []}, [[], []], "2 slots need as many workers, and there are 1"),
        ({0: [ByteRange(0, 3, 3)]}, [[]], "has no bytes"),
        ({0: [ByteRange(0, -1, 3)]}, [[]], "start at 0 or later"),
        ({0: []}, [[ByteRange(0, 0, 5), ByteRange(0, 4, 6)]], "overlap"),
    ],
)
def test_malformed_pieces_are_refused(held, slots, message):
    with pytest.raises(PlanError, match=message):
        relabel(held, slots)


def test_no_slots_and_no_workers_are_no_trouble():
    assert relabel({}, []).workers == ()
    assert relabel({3: [ByteRange(0, 0, 4)]}, []).moved_bytes == 0
    assert balance([], {}).sends == ()


@pytest.mark.slow
@few
@given(st.data())
def test_missing_is_what_is_needed_and_not_held_and_names_all_who_have_it(data):
    held = {worker: data.draw(pieces()) for worker in range(4)}
    everything = set().union(*map(bytes_of, held.values()))
    needed = {worker: [piece for piece in data.draw(pieces()) if bytes_of([piece]) <= everything] for worker in (1, 3, 9)}
    found = missing(held, needed)
    got: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for lack in found:
        got[lack.destination] += bytes_of([lack.piece])
        for byte in bytes_of([lack.piece]):
            assert lack.sources == tuple(worker for worker in held if byte in bytes_of(held[worker]))
    for worker, some in needed.items():
        assert sorted(got[worker]) == sorted(bytes_of(some) - bytes_of(held.get(worker, [])))


def test_what_nobody_has_is_refused():
    with pytest.raises(PlanError, match="no worker has byte 4 of layer 0, which worker 1 needs"):
        missing({0: [ByteRange(0, 0, 4)]}, {1: [ByteRange(0, 2, 6)]})
    with pytest.raises(PlanError, match="no worker has byte 0 of layer 5"):
        missing({0: [ByteRange(0, 0, 4)]}, {1: [ByteRange(5, 0, 6)]})


@st.composite
def lacks(draw, most: int, longest: int) -> list[Lacking]:
    sources = st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True)
    sizes = draw(st.lists(st.integers(1, longest), min_size=1, max_size=most))
    return [Lacking(10 + i % 2, ByteRange(i, 3, 3 + size), tuple(draw(sources))) for i, size in enumerate(sizes)]


def seconds(sends: tuple[Send, ...], rates: dict[int, float]) -> float:
    load: dict[tuple[str, int], int] = defaultdict(int)
    for source, destination, piece in sends:
        load["out", source] += piece.stop - piece.start
        load["in", destination] += piece.stop - piece.start
    return max(size / rates[worker] for (_, worker), size in load.items())


rates_of_sources = st.fixed_dictionaries({worker: st.sampled_from([1.0, 2.0, 3.5]) for worker in range(4)})


@few
@given(lacks(most=6, longest=40), rates_of_sources, st.sampled_from([1, 4, 8]))
def test_all_is_sent_once_by_who_has_it_near_a_bound_that_subsets_confirm(lacking, rates, block):
    rates = {**rates, 10: 5.0, 11: 5.0}
    found = balance(lacking, rates, block=block)
    for lack in lacking:
        mine = [send for send in found.sends if send.destination == lack.destination and send.piece.layer == lack.piece.layer]
        assert sorted(byte for send in mine for byte in range(send.piece.start, send.piece.stop)) == list(range(*lack.piece[1:]))
        assert {send.source for send in mine} <= set(lack.sources)
        assert all((send.piece.start - lack.piece.start) % block == 0 for send in mine)
    subsets = [some for size in range(1, 5) for some in combinations(range(4), size)]
    bound = max(
        sum(lack.piece.stop - lack.piece.start for lack in lacking if set(lack.sources) <= set(some)) / sum(rates[s] for s in some)
        for some in subsets
    )
    bound = max(bound, seconds(tuple(Send(0, lack.destination, lack.piece) for lack in lacking), {**rates, 0: 1e9}))
    assert found.finish_s == pytest.approx(seconds(found.sends, rates))
    assert found.bound_s <= bound * (1 + 1e-9)
    assert found.finish_s >= bound * (1 - 1e-9)
    # Only whole blocks separate it from the bound: at most one per piece, and one per source.
    slack = block * (len(lacking) + 4) / min(rates.values())
    assert found.finish_s <= found.bound_s + slack


@few
@given(lacks(most=3, longest=3), rates_of_sources)
def test_no_choice_of_sources_finishes_earlier(lacking, rates):
    rates = {**rates, 10: 2.0, 11: 1.0}
    choices = [source for lack in lacking for source in [lack.sources] * (lack.piece.stop - lack.piece.start)]
    units = [(lack.destination, ByteRange(lack.piece.layer, at, at + 1)) for lack in lacking for at in range(*lack.piece[1:])]
    best = min(
        seconds(tuple(Send(source, *unit) for source, unit in zip(choice, units, strict=True)), rates)
        for choice in product(*(sources[:2] for sources in choices))
    )
    lacking = [lack._replace(sources=lack.sources[:2]) for lack in lacking]
    assert balance(lacking, rates, block=1).finish_s == pytest.approx(best)


@pytest.mark.parametrize(
    ("lack", "rates", "message"),
    [
        (Lacking(1, ByteRange(0, 0, 4), ()), {1: 1.0}, "no worker has"),
        (Lacking(1, ByteRange(0, 0, 4), (2,)), {1: 1.0}, "worker 2 has a rate of 0"),
        (Lacking(1, ByteRange(0, 0, 4), (2,)), {1: float("nan"), 2: 1.0}, "worker 1 has a rate of nan"),
    ],
)
def test_what_cannot_be_sent_is_refused(lack, rates, message):
    with pytest.raises(PlanError, match=message):
        balance([lack], rates)


def job(stages: int, width: int, layers: int, size: int, lost: frozenset[int]) -> tuple[Held, list[list[ByteRange]]]:
    """ZeRO: members of a stage hold its layers whole, and each its share of the optimizer's states and a neighbour's; some are lost."""

    def share(rank: int, of: int, layer: int) -> ByteRange:
        return ByteRange(1000 + layer, size * rank // of * 3, size * (rank + 1) // of * 3)

    def needs(stage: int, rank: int, of: int) -> list[ByteRange]:
        here = range(stage * layers, (stage + 1) * layers)
        return [piece for layer in here for piece in {ByteRange(layer, 0, size), share(rank, of, layer), share((rank + 1) % of, of, layer)}]

    held, slots = {}, []
    for stage in range(stages):
        alive = [rank for rank in range(width) if stage * width + rank not in lost]
        held |= {stage * width + rank: needs(stage, rank, width) for rank in alive}
        slots += [needs(stage, rank, len(alive)) for rank in range(len(alive))]
    return held, slots


@pytest.mark.slow
def test_five_hundred_workers_after_one_loss():
    held, slots = job(stages=16, width=32, layers=8, size=50_000_000, lost=frozenset({37}))
    found = relabel(held, slots)
    lacking = missing(held, dict(zip(found.workers, slots, strict=True)))
    plan = balance(lacking, dict.fromkeys(held, 1e9), block=4096)
    assert found.workers.index(0) == 0
    assert sum(lack.piece.stop - lack.piece.start for lack in lacking) == found.moved_bytes
    assert plan.finish_s <= plan.bound_s * 1.01
