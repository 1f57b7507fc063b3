"""The judge: closed forms, an independent recursion, lower bounds; links, slow workers, synchronisation, updates; deadlocks are shown."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_strategies import few, positive_eighths
from schedule_strategies import cases, column, latest_end, seconds_of

from elastic.errors import PlanError
from elastic.plan import schedule
from elastic.plan.policy import Policy
from elastic.plan.simulation import judge, run, simulate
from elastic.plan.timing import Timing

pairs = st.tuples(positive_eighths, positive_eighths)


@few
@given(st.integers(1, 6), st.integers(1, 12), positive_eighths, positive_eighths)
def test_equal_stages_take_the_slowest_once_a_micro_batch_and_the_others_once(depth, micro_batches, forward_s, backward_s):
    timeline = judge(*column([(forward_s, backward_s)] * depth, micro_batches))
    both = forward_s + backward_s
    assert timeline.end_s == (micro_batches - 1) * both + depth * both


@few
@given(st.lists(pairs, min_size=1, max_size=5), st.data())
def test_one_micro_batch_takes_the_sum_of_everything_on_its_way(seconds, data):
    times = st.lists(positive_eighths, min_size=len(seconds) - 1, max_size=len(seconds) - 1)
    up, down = data.draw(times), data.draw(times)
    case = column(seconds, 1)
    timing = Timing.of(case[0], case[1]).linked(up, down)
    assert judge(*case, timing=timing).end_s == sum(f + b for f, b in seconds) + sum(up) + sum(down)


@few
@given(pairs, positive_eighths, st.integers(0, 8), st.integers(1, 6))
def test_a_link_slower_than_computing_is_what_counts(pair, factor, surplus, micro_batches):
    """The activations of one micro-batch after the other cross; nothing holds up the sender, who may have all of them in flight."""
    forward_s, backward_s = pair
    link_s = forward_s + backward_s + surplus / 8
    case = column([pair, pair], micro_batches)
    timing = Timing.of(case[0], case[1]).linked([link_s], [0.0])
    policy = Policy(first="forward", in_flight=(micro_batches, micro_batches))
    expected = forward_s + micro_batches * link_s + forward_s + 2 * backward_s
    assert judge(*case, timing=timing, policy=policy).end_s == expected


@few
@given(pairs, st.integers(0, 3), st.integers(1, 8), st.sampled_from([1.0, 2.0, 3.0]))
def test_a_slow_worker_is_the_slowest_stage(pair, slow, micro_batches, factor):
    case = column([pair] * 4, micro_batches)
    both = sum(pair)
    expected = (micro_batches - 1) * both * factor + both * (3 + factor)
    policy = Policy(first="forward", in_flight=(micro_batches,) * 4)
    for timing in (Timing.of(*case[:2]).slowed({slow: factor}), Timing.of(*case[:2]).slowed(stages={slow: factor})):
        seconds = judge(*case, timing=timing, policy=policy).end_s
        assert micro_batches * both * factor <= seconds <= expected


@few
@given(cases())
def test_what_it_finds_is_the_longest_chain(case):
    workload, stages, routes, policy, timing = case
    lists, seconds = simulate(workload, stages, routes, policy=policy, timing=timing)
    timeline = run(lists, timing)
    assert timeline.compute_end_s == seconds == latest_end(lists, timing)
    assert timeline == judge(workload, stages, routes, policy=policy, timing=timing)
    assert sorted((worker, action) for action, worker, _, _ in timeline.actions()) == sorted(
        (w, a) for w, row in lists.items() for a in row
    )


@few
@given(cases())
def test_it_is_never_below_the_load_of_a_worker_nor_the_way_of_a_micro_batch(case):
    workload, stages, routes, policy, timing = case
    lists, seconds = simulate(workload, stages, routes, policy=policy, timing=timing)
    for worker, actions in lists.items():
        assert seconds >= sum(seconds_of(action, worker, timing) for action in actions)
    for grain in range(workload.grains):
        way = [route[grain] for route in routes]
        computing = sum(timing.paces[worker].forward_s + timing.paces[worker].inputs_s for worker in way)
        links = sum(timing.link_s(a, b) + timing.link_s(b, a) for a, b in pairwise(way))
        assert seconds >= computing + links + timing.paces[way[0]].weights_s


@few
@given(cases())
def test_spans_of_a_worker_do_not_overlap_and_end_with_its_update(case):
    workload, stages, routes, policy, timing = case
    timeline = judge(workload, stages, routes, policy=policy, timing=timing)
    ends = {}
    for stage, group in enumerate(timeline.members):
        last = {worker: max((s.end_s for s in timeline.spans[worker] if s.computes), default=0.0) for worker in group}
        for worker in group:
            spans = timeline.spans[worker]
            assert all(before.end_s <= after.start_s for before, after in pairwise(spans))
            ends[worker] = max(last.values()) + timing.sync_s[stage] if timing.sync_s[stage] else last[worker]
            assert [s.start_s for s in spans if s.activity == "sync"] == ([max(last.values())] if timing.sync_s[stage] else [])
    for worker, spans in timeline.spans.items():
        start = max(ends.values()) if timing.barrier else ends[worker]
        update_s = timing.paces[worker].update_s
        assert [(s.start_s, s.end_s) for s in spans if s.activity == "update"] == ([(start, start + update_s)] if update_s else [])


def test_synchronisation_overlaps_with_other_stages():
    case = column([(1, 2), (1, 2)], 4)
    base = judge(*case).end_s
    timing = Timing.of(*case[:2])
    assert judge(*case, timing=replace(timing, sync_s=(0.0, 2.0))).end_s == base
    assert judge(*case, timing=replace(timing, sync_s=(0.0, 3.0))).end_s == base + 1
    assert judge(*case, timing=replace(timing, sync_s=(0.5, 0.0)).updating({0: 0.25})).end_s == base + 0.75
    assert judge(*case, timing=timing.updating({1: 1.0})).end_s == base
    assert judge(*case, timing=replace(timing.updating({1: 1.0}), barrier=True)).end_s == base + 1


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("0: 0F0 0F1 0B0 0B1\n1: 1F0 1B1 1F1 1B0", ["0: 0F0 0F1 >0B0< 0B1", "1: 1F0 >1B1< 1F1 1B0"]),
        ("0: 0F0 0I0 0W0\n1: 1F0 1W0 1I0", ["0: 0F0 >0I0< 0W0", "1: 1F0 >1W0< 1I0"]),
        ("0: 0F0 0B0\n1: 1F0", ["0: 0F0 >0B0<", "1: 1F0"]),
    ],
)
def test_a_deadlock_is_shown(text, marked):
    case = column([(1, 1), (1, 1)], 2)
    with pytest.raises(PlanError, match="deadlock") as caught:
        run(schedule.parse(text), Timing.of(*case[:2]))
    assert str(caught.value).splitlines()[1:] == marked


def test_workers_that_are_not_in_the_plan_are_refused():
    case = column([(1, 1), (1, 1)], 2)
    with pytest.raises(PlanError, match=r"names workers \[7\]"):
        run({7: ()}, Timing.of(*case[:2]))


def test_a_mix_of_whole_and_split_backwards_runs():
    case = column([(1, 2), (1, 2)], 2)
    lists = schedule.parse("0: 0F0 0F1 0I0 0I1 0W0 0W1\n1: 1F0 1B0 1F1 1B1")
    schedule.validate(lists, case[0], case[2])
    assert run(lists, Timing.of(*case[:2])).end_s == 10
