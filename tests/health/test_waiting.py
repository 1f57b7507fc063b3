"""Tests the wait-for graph."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from elastic.health.evidence import Observed
from elastic.health.waiting import MUTE_S, awaited, believed
from elastic.observe.activity import AGENT, NOBODY, Standing


def seen(waits: dict[int, int], stopped: frozenset[int] = frozenset()) -> list[Observed]:
    return [
        Observed(worker=worker, pid=worker, state="T" if worker in stopped else "S", standing=Standing(waits_for=peer))
        for worker, peer in waits.items()
    ]


def test_the_root_of_a_chain() -> None:
    assert awaited(seen({0: 2, 1: NOBODY, 2: 1, 3: 1})) == {1: (0, 2, 3)}


def test_two_roots() -> None:
    assert awaited(seen({0: 1, 1: NOBODY, 2: 3, 3: NOBODY})) == {1: (0,), 3: (2,)}


def test_a_circle_has_no_root() -> None:
    assert awaited(seen({0: 1, 1: 0, 2: 1})) == {}


def test_in_a_circle_the_one_in_which_no_code_runs_is_the_root() -> None:
    around = seen({0: 1, 1: 2, 2: 0, 3: 0})
    mute = replace(around[1], mute_s=MUTE_S)
    assert awaited(believed([around[0], mute, *around[2:]])) == {1: (0, 2, 3)}
    assert believed([around[0], mute, replace(around[2], mute_s=MUTE_S), around[3]])[1] is mute, "another one is as silent"
    assert believed([*around[:3], replace(around[3], mute_s=MUTE_S)])[:3] == around[:3], "it is in no circle"


def test_a_stopped_worker_waits_for_nobody() -> None:
    assert awaited(seen({0: 1, 1: 2, 2: NOBODY}, frozenset({1}))) == {1: (0,)}


def test_one_that_waits_for_the_agent_keeps_nobody_waiting() -> None:
    assert awaited(seen({0: 1, 1: AGENT})) == {}


def test_the_agent_waits_too() -> None:
    assert awaited(seen({0: AGENT, 1: 2, 2: NOBODY}), asked=[1]) == {2: (1, AGENT)}


def test_one_that_is_gone_is_not_blamed() -> None:
    assert awaited(seen({0: 7})) == {}


@given(st.dictionaries(st.integers(0, 6), st.integers(-2, 7)), st.sets(st.integers(0, 6)))
def test_roots_wait_for_nobody_and_everybody_waits_for_one_at_most(waits: dict[int, int], asked: set[int]) -> None:
    roots = awaited(seen(waits), asked)
    assert all(waits[root] == NOBODY for root in roots)
    victims = [worker for waiting in roots.values() for worker in waiting if worker != AGENT]
    assert len(victims) == len(set(victims))
    assert all(waits[worker] >= 0 for worker in victims)
