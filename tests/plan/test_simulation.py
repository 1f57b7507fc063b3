"""Tests the simulator: closed forms, an independent recursion, lower bounds; links, slow workers, synchronisation, updates."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_strategies import few, planned, positive_eighths
from schedule_checks import validate
from schedule_strategies import actions_of, cases, column, compute_end_s, latest_end, link_s, seconds_of, updating

from elastic.plan.scheduling import Scheduler
from elastic.plan.simulation import judge, simulate
from elastic.plan.slicing import finish
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
@given(pairs, positive_eighths, st.integers(1, 6))
def test_links_slower_than_computing_are_what_counts(pair, surplus, micro_batches):
    """With the two micro-batches that 1F1B allows in flight one crosses, up and down, while the other one does."""
    forward_s, backward_s = pair
    link_s = forward_s + backward_s + surplus
    case = column([pair, pair], micro_batches)
    timing = Timing.of(case[0], case[1]).linked([link_s], [0.0])
    end_s = judge(*case, timing=timing).end_s
    assert end_s >= forward_s + micro_batches * link_s / 2 + forward_s + 2 * backward_s
    assert end_s <= micro_batches * (2 * forward_s + link_s + 2 * backward_s)


@few
@given(pairs, st.integers(0, 3), st.integers(1, 8), st.sampled_from([1.0, 2.0, 3.0]))
def test_a_slow_worker_is_the_slowest_stage(pair, slow, micro_batches, factor):
    case = column([pair] * 4, micro_batches)
    both = sum(pair)
    as_slow_everywhere = (micro_batches + 3) * both * factor
    seconds = judge(*case, timing=Timing.of(*case[:2]).slowed({slow: factor})).end_s
    assert micro_batches * both * factor <= seconds <= as_slow_everywhere


@few
@given(cases())
def test_what_it_finds_is_the_longest_chain(case):
    workload, stages, routes, timing = case
    lists, seconds = simulate(workload, stages, routes, timing=timing)
    timeline = judge(workload, stages, routes, timing=timing)
    assert compute_end_s(timeline) == seconds == latest_end(lists, timing)
    assert sorted((worker, action) for action, worker in actions_of(timeline)) == sorted((w, a) for w, row in lists.items() for a in row)


@few
@given(cases())
def test_it_is_never_below_the_load_of_a_worker_nor_the_way_of_a_micro_batch(case):
    workload, stages, routes, timing = case
    lists, seconds = simulate(workload, stages, routes, timing=timing)
    for worker, actions in lists.items():
        assert seconds >= sum(seconds_of(action, worker, timing) for action in actions)
    for grain in range(workload.grains):
        way = [route[grain] for route in routes]
        computing = sum(timing.paces[worker].forward_s + timing.paces[worker].backward_s for worker in way)
        links = sum(link_s(timing, a, b) + link_s(timing, b, a) for a, b in pairwise(way))
        assert seconds >= computing + links


@few
@given(cases())
def test_spans_of_a_worker_do_not_overlap_and_end_with_its_update(case):
    workload, stages, routes, timing = case
    timeline = judge(workload, stages, routes, timing=timing)
    ends = {}
    for stage, group in enumerate(timeline.members):
        last = {worker: max((s.end_s for s in timeline.spans[worker] if s.computes), default=0.0) for worker in group}
        for worker in group:
            spans = timeline.spans[worker]
            assert all(before.end_s <= after.start_s for before, after in pairwise(spans))
            ends[worker] = max(last.values()) + timing.sync_s[stage] if timing.sync_s[stage] else last[worker]
            assert [s.start_s for s in spans if s.activity == "sync"] == ([max(last.values())] if timing.sync_s[stage] else [])
    for worker, spans in timeline.spans.items():
        start, update_s = ends[worker], timing.paces[worker].update_s
        assert [(s.start_s, s.end_s) for s in spans if s.activity == "update"] == ([(start, start + update_s)] if update_s else [])


def test_synchronisation_overlaps_with_other_stages():
    case = column([(1, 2), (1, 2)], 4)
    base = judge(*case).end_s
    timing = Timing.of(*case[:2])
    assert judge(*case, timing=replace(timing, sync_s=(0.0, 2.0))).end_s == base
    assert judge(*case, timing=replace(timing, sync_s=(0.0, 3.0))).end_s == base + 1
    assert judge(*case, timing=updating(replace(timing, sync_s=(0.5, 0.0)), {0: 0.25})).end_s == base + 0.75
    assert judge(*case, timing=updating(timing, {1: 1.0})).end_s == base


@pytest.mark.parametrize("slow", range(4))
def test_a_slow_stage_is_not_kept_waiting_for_others(slow):
    """A worker that never waits, though the gradient comes soon, makes steps up to a quarter longer (1.25 of the busiest stage's time)."""
    seconds = [(8 * (3 if at == slow else 2), 16 * (3 if at == slow else 2)) for at in range(4)]
    workload, stages, routes = column(seconds, 64)
    busiest_s = 64 * sum(seconds[slow])
    fill_and_drain_s = sum(map(sum, seconds)) - sum(seconds[slow])
    lists, step_s = simulate(workload, stages, routes)
    validate(lists, workload, routes)
    assert step_s <= busiest_s + fill_and_drain_s


@few
@given(planned())
def test_no_step_takes_longer_than_with_workers_that_never_wait(case):
    workload, stages, routes = case
    eager = Scheduler(workload, routes, Timing.of(workload, stages))
    assert simulate(workload, stages, routes)[1] <= finish(eager.running())
    assert eager.complete


def test_workers_that_would_wait_for_each_other_do_not():
    """Patient, a worker of the second stage wants three forwards first, and the first stage wants a gradient before it sends the third."""
    workload, stages, _ = column([(1, 2)] * 4, 16, [1, 2, 2, 2])
    routes = [[stage.members[grain % len(stage.members)] for grain in range(16)] for stage in stages]
    patient = Scheduler(workload, routes, Timing.of(workload, stages), patient=True)
    finish(patient.running())
    assert not patient.complete
    lists, _ = simulate(workload, stages, routes)
    validate(lists, workload, routes)
