"""Tests inventories as JSON, and the newest step of which every coordinate has a copy."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.errors import CoverageLost, StateUnproven
from elastic.layout.regions import BLOCK, LayerSpec, ModelSpec
from elastic.recovery.inventory import Copy, Inventory, Progress
from elastic.recovery.resume import Trust, resume_step

BLOCKS = 4
SIZE = BLOCKS * BLOCK
MODEL = ModelSpec(
    layers=(LayerSpec.build(0, [("a", (SIZE,), "float32")]), LayerSpec.build(1, []), LayerSpec.build(2, [("b", (SIZE,), "float32")]))
)

roles = st.sampled_from(["live", "previous", "replica", "gathered"])


@st.composite
def copies(draw) -> Copy:
    first = draw(st.integers(0, BLOCKS - 1))
    stop = draw(st.integers(first + 1, BLOCKS))
    layer, step = draw(st.sampled_from([0, 2])), draw(st.integers(-1, 2))
    return Copy(layer=layer, start=first * BLOCK, stop=stop * BLOCK, step=step, role=draw(roles), scalars=draw(st.booleans()))


@st.composite
def inventories(draw) -> list[Inventory]:
    held = draw(st.lists(st.lists(copies(), max_size=8), min_size=1, max_size=4))
    return [Inventory(worker=i, yielded=draw(st.integers(-1, 1)), copies=tuple(found)) for i, found in enumerate(held)]


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(inventories())
def test_it_is_the_newest_step_of_which_every_block_has_a_full_copy(found):
    every = {(layer, block) for layer in (0, 2) for block in range(BLOCKS)}
    had = {
        step: {
            (copy.layer, block)
            for inventory in found
            for copy in inventory.copies
            if copy.step == step and copy.role != "gathered" and copy.scalars
            for block in range(copy.start // BLOCK, copy.stop // BLOCK)
        }
        for step in range(-1, 3)
    }
    complete = [step for step, blocks in had.items() if blocks == every]
    yielded = max(inventory.yielded for inventory in found)
    if complete and complete[-1] >= yielded:
        assert resume_step(MODEL, found) == complete[-1]
    else:
        with pytest.raises(CoverageLost, match="last step known"):
            resume_step(MODEL, found)


def whole(step: int, role="live", layers=(0, 2)) -> list[Copy]:
    return [Copy(layer=layer, start=0, stop=SIZE, step=step, role=role) for layer in layers]


def inventory(*held: Copy, worker: int = 0, yielded: int = -1) -> Inventory:
    return Inventory(worker=worker, yielded=yielded, copies=held)


def test_spare_and_replica_complete_a_step_together():
    found = [inventory(*whole(6), *whole(5, "previous", (0,))), inventory(*whole(5, "replica", (2,)), worker=1)]
    assert resume_step(MODEL, found) == 6
    assert resume_step(MODEL, [inventory(*whole(6, layers=(0,)), *whole(5, "previous", (0,))), found[1]]) == 5


def test_gathered_parameters_are_not_full_copies():
    with pytest.raises(CoverageLost, match=r"layer 0 \[0, 16384\), layer 2 \[0, 16384\) of step -1; the last step known is -1"):
        resume_step(MODEL, [inventory(*whole(3, "gathered"))])


def test_gathered_parameters_are_full_copies_of_what_is_not_trained():
    model = ModelSpec(layers=(LayerSpec.build(0, []), LayerSpec.build(1, [("w", (SIZE,), "uint8")], (), 0, frozen=True)))
    assert resume_step(model, [inventory(*whole(3, role="gathered", layers=(1,)))]) == 3


def test_copies_whose_scalars_nobody_knows_are_not_full():
    newer = [Copy(layer=copy.layer, start=copy.start, stop=copy.stop, step=4, role="replica", scalars=False) for copy in whole(4)]
    assert resume_step(MODEL, [inventory(*whole(3), *newer)]) == 3


def test_the_newest_yielded_step_is_taken_again_and_none_before_it():
    found = [inventory(*whole(5), *whole(6, layers=(0,)), yielded=6)]
    assert resume_step(MODEL, found) == 5
    found = [inventory(*whole(5), *whole(6, layers=(0,)), yielded=7)]
    with pytest.raises(CoverageLost, match=r"layer 2 \[0, 16384\) of step 6; the last step known is 6; step 6 was complete everywhere"):
        resume_step(MODEL, found)


def test_different_digests_of_one_run_are_a_conflict():
    def copy(digest: str | None, role="live", step: int = 3) -> Copy:
        return Copy(layer=0, start=0, stop=SIZE, step=step, role=role, digest=digest)

    rest = whole(3, layers=(2,))
    with pytest.raises(StateUnproven, match=r"layer 0, run \[0, 16384\) of step 3 has digest aa on worker 0 \(live\) and bb on worker 1"):
        resume_step(MODEL, [inventory(copy("aa"), *rest), inventory(copy("bb", "replica"), worker=1)])
    agreeing = [copy("aa", "replica"), copy(None, "replica"), copy("cc", "gathered"), copy("dd", step=2)]
    for other in agreeing:
        assert resume_step(MODEL, [inventory(copy("aa"), *rest), inventory(other, worker=1)]) == 3


def test_copies_that_differ_are_gone_back_behind():
    def copy(digest: str, role: str) -> Copy:
        return Copy(layer=0, start=0, stop=SIZE, step=6, role=role, digest=digest)  # pyright: ignore[reportArgumentType]

    older = [Copy(layer=layer, start=0, stop=SIZE, step=2, role="kept") for layer in (0, 2)]
    rest = (*whole(7), *whole(6, layers=(2,)))
    one, other = inventory(copy("aa", "previous"), *rest, *older), inventory(copy("bb", "replica"), worker=1)
    trust = Trust.of([one, other])
    assert trust.back == 5
    assert [each.described(MODEL) for each in trust.conflicts] == [
        "layer 0, run [0, 16384) of step 6 has digest aa on worker 0 (previous) and bb on worker 1 (replica)"
    ]
    assert resume_step(MODEL, [one, other]) == 2, "also if loops were given later steps"


def test_what_a_worker_has_found_to_differ_is_not_resumed_from():
    older = [Copy(layer=layer, start=0, stop=SIZE, step=2, role="kept") for layer in (0, 2)]
    unaware, aware = inventory(*whole(7), *older, yielded=7), replace(inventory(*whole(6), worker=1), back=5)
    assert Trust.of([unaware, aware]) == Trust(back=5)
    assert resume_step(MODEL, [unaware, aware]) == 2
    with pytest.raises(StateUnproven, match="No state of step 5 or before, which was the same in all copies, is complete in memory"):
        resume_step(MODEL, [replace(unaware, copies=unaware.copies[:-1]), aware])
    assert resume_step(MODEL, [unaware]) == 7


def test_a_model_without_parameters_needs_nothing():
    assert resume_step(ModelSpec(layers=(LayerSpec.build(0, []),)), [inventory(yielded=4)]) == 3


def test_json_round_trip_restores_step_numbers():
    found = Inventory(
        worker=3,
        yielded=4,
        copies=(*whole(4), Copy(layer=0, start=0, stop=64, step=-1, role="replica", digest="aa")),
        states={"exp_avg": "same", "exp_avg_sq": "float32"},
        scalars={4: {"a": {"step": 5.0}}, -1: {}},
        progress={4: Progress(step=4, apply={"clip": 0.5}, scheduler={"last_epoch": 4}, groups=[{"lr": 0.1}])},
        results=[1, {"loss": 2.0}],
        back=3,
    )
    assert Inventory.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_messages_name_the_module_and_its_part():
    """The vectors behind those of all modules have numbers of their own, which users do not know."""
    parts = [
        LayerSpec.build(1, [("a", (SIZE,), "bfloat16")], (), 0),
        LayerSpec.build(2, [("b", (SIZE,), "uint8")], (), 0, frozen=True),
    ]
    model = ModelSpec(layers=(LayerSpec.build(0, [("w", (SIZE,), "float32")]), *parts))
    with pytest.raises(
        CoverageLost, match=r"full copy of layer 0 \(bfloat16 part\) \[0, 16384\), layer 0 \(frozen uint8 part\) \[0, 16384\) of step 3;"
    ):
        resume_step(model, [inventory(*whole(3, layers=(0,)))])
