"""Tests which held copy fills which run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic.engine.shard import Shard
from elastic.layout.layout import Interval
from elastic.layout.transfer import PARAM, Role
from elastic.snapshot.held_copies import Held, UnreplayedCopy, dtypes, held, runs

SIZE = 64


def values(start: int, stop: int) -> torch.Tensor:
    return torch.arange(start, stop, dtype=torch.float32)


def copy(start: int, stop: int, role: Role = "live", step: int = 5, layer: int = 1, states: tuple[str, ...] = ("m",)) -> Held:
    memory = {PARAM: values(start, stop), **{state: -values(start, stop) for state in states}}
    return Held(layer=layer, start=start, stop=stop, step=step, role=role, memory=memory, scalars={})


def pieces(found: list[tuple[int, int, torch.Tensor | None]]) -> list[tuple[int, int]]:
    return [(start, stop) for start, stop, _ in found]


def test_pieces_are_cut_to_the_run_and_carry_its_values() -> None:
    found = runs([copy(0, 20), copy(30, 64)], 5, PARAM, 1, 10, 40)
    assert pieces(found) == [(10, 20), (30, 40)]
    for start, stop, memory in found:
        assert memory is not None
        assert torch.equal(memory, values(start, stop))


def test_the_longest_copy_is_taken_and_nothing_twice() -> None:
    assert pieces(runs([copy(0, 20), copy(0, 50), copy(40, 64)], 5, "m", 1, 0, 64)) == [(0, 50), (50, 64)]


def test_another_step_or_layer_does_not_fit() -> None:
    assert runs([copy(0, 64, step=4), copy(0, 64, layer=0)], 5, PARAM, 1, 0, 64) == []


def test_gathered_copies_have_parameters_only() -> None:
    gathered = copy(0, 64, "gathered", states=())
    assert pieces(runs([gathered], 5, PARAM, 1, 0, 64)) == [(0, 64)]
    assert runs([gathered], 5, "m", 1, 0, 64) == []


def test_a_state_that_was_never_made_counts_as_zeros() -> None:
    (piece,) = runs([copy(0, 64, states=())], 5, "m", 1, 8, 16)
    assert piece == (8, 16, None)


@given(
    st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(sorted).filter(lambda run: run[0] < run[1]), max_size=6), st.data()
)
def test_pieces_are_ascending_disjoint_and_all_that_is_held(have: list[list[int]], data: st.DataObject) -> None:
    start, stop = sorted(data.draw(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE))))
    found = runs([copy(*run) for run in have], 5, PARAM, 1, start, stop)
    covered = [position for first, last in pieces(found) for position in range(first, last)]
    assert covered == sorted({p for first, last in have for p in range(max(first, start), min(last, stop))})
    assert all(memory is not None and torch.equal(memory, values(first, last)) for first, last, memory in found)


def later(asked: list[str], step: int = 5) -> UnreplayedCopy:
    def make() -> Shard:
        asked.append("made")
        return Shard(layer=1, interval=interval, memory={PARAM: values(0, SIZE)}, scalars={"w": {"step": 2.0}})

    interval = Interval(start=0, stop=SIZE, owner=3, replicas=(0,))
    return UnreplayedCopy(Shard(layer=1, interval=interval, memory={}), step, make)


def test_what_is_made_later_is_made_for_a_run_of_it_only() -> None:
    asked: list[str] = []
    copies = [later(asked)]
    assert runs(copies, 4, PARAM, 1, 0, 64) == runs(copies, 5, PARAM, 0, 0, 64) == []
    assert asked == []
    assert pieces(runs(copies, 5, PARAM, 1, 0, 64)) == [(0, 64)]
    assert copies[0].scalars == {"w": {"step": 2.0}}
    assert asked == ["made"]


def test_a_shard_as_something_to_give_shares_its_memory() -> None:
    shard = Shard(layer=2, interval=Interval(start=64, stop=128, owner=0, replicas=(1,)), memory={PARAM: values(64, 128)})
    found = held(shard, 7, "live", {"w": {"step": 8.0}})
    assert (found.layer, found.start, found.stop, found.step, found.role) == (2, 64, 128, 7, "live")
    assert found.memory[PARAM] is shard.memory[PARAM]
    shard.memory["m"] = values(64, 128)
    assert found.memory.keys() == {PARAM}, "states that are made later are not of this step"


@pytest.mark.parametrize(("state", "name"), [(torch.float32, "float32"), (torch.bfloat16, "same")])
def test_dtypes_by_name(state: torch.dtype, name: str) -> None:
    memory = {PARAM: values(0, 8).bfloat16(), "m": values(0, 8).to(state)}
    one = Held(layer=0, start=0, stop=8, step=1, role="live", memory=memory, scalars={})
    assert dtypes([one], {0: torch.bfloat16}) == {"m": name}
