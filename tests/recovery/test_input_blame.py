"""Tests when an input is blamed for a death, and that kills from outside never cause that."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import elastic
from elastic.control.input_blame import DEATHS, MicroBatchLoss, blamed, does_not_fit

FATAL = MicroBatchLoss(worker=1, epoch=1, step=12, micro_batch=3, layers=(0, 1), own=True, host="a")
THREE = [FATAL, replace(FATAL, worker=4, epoch=2, layers=(0,)), replace(FATAL, worker=2, epoch=3, layers=(0, 1, 2))]


def test_the_same_micro_batch_has_ended_three() -> None:
    assert blamed(THREE[:1]) is None
    assert blamed(THREE[:2]) is None
    said = blamed(THREE)
    assert said is not None
    assert "micro-batch 3 of step 12 has ended or hung every worker that computed it (1, 4, 2)" in said


def test_losses_at_other_steps_do_not_matter() -> None:
    others = [replace(FATAL, step=11, own=False), replace(FATAL, epoch=0, step=None, own=False)]
    assert blamed([*others, *THREE]) is not None
    assert blamed([*THREE, others[0]]) is None, "the last one is no victim"


def test_who_loads_it_at_the_other_end_of_the_pipeline_is_a_victim_too() -> None:
    ends = [replace(FATAL, worker=10 + loss.worker, epoch=loss.epoch, layers=(3,)) for loss in THREE[:2]]
    assert blamed([*ends, *THREE]) is not None


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"own": False}, id="killed from outside"),
        pytest.param({"micro_batch": 4}, id="another micro-batch"),
        pytest.param({"micro_batch": None, "own": False}, id="it did not compute"),
        pytest.param({"step": None, "micro_batch": None, "own": False}, id="nobody knows what it did"),
    ],
)
@pytest.mark.parametrize("place", range(DEATHS))
def test_one_more_loss_of_another_kind_acquits_the_input(other: dict[str, object], place: int) -> None:
    stranger = replace(FATAL, worker=9, epoch=THREE[place].epoch, **other)  # pyright: ignore[reportArgumentType]
    losses = [*THREE[:place], stranger, *THREE[place:]]
    assert blamed(losses) is None


def test_victims_must_have_computed_the_same_layer() -> None:
    assert blamed([replace(loss, layers=(number,)) for number, loss in enumerate(THREE)]) is None


def test_a_host_that_kills_is_no_input() -> None:
    """In a job on several hosts. On a single host the two cannot be distinguished."""
    several = [replace(loss, elsewhere=True) for loss in THREE]
    assert blamed(several) is None
    assert blamed([*several[:2], replace(several[2], host="b")]) is not None


FULL = MicroBatchLoss(worker=1, epoch=1, step=7, own=True, no_memory=True)


def test_a_step_that_runs_out_of_memory_each_time_does_not_fit() -> None:
    """In an update, say, where no micro-batch is computed; all workers of a view may run out of memory at once."""
    pairs = [replace(FULL, worker=2 * epoch + each, epoch=epoch) for epoch in (1, 2, 3) for each in (0, 1)]
    assert does_not_fit(pairs[:4]) is None
    said = does_not_fit(pairs[:5])
    assert said is not None
    assert "each time that step 7 was tried, workers ran out of memory (2, 3, 4, 5, 6)" in said
    assert blamed(pairs) is None


@pytest.mark.parametrize("other", [{"step": 8}, {"step": None}, {"no_memory": False}])
def test_a_loss_of_another_kind_is_no_lack_of_memory(other: dict[str, object]) -> None:
    losses = [replace(FULL, worker=epoch, epoch=epoch) for epoch in (1, 2, 3)]
    assert does_not_fit(losses) is not None
    assert does_not_fit([*losses[:2], replace(losses[2], **other)]) is None  # pyright: ignore[reportArgumentType]


@given(seed=st.integers(0, 2**32))
def test_whatever_is_killed_from_outside_no_input_is_blamed(seed: int) -> None:
    """Also where it strikes the same micro-batch again and again, and workers crash by themselves at other ones in between."""
    chance = random.Random(seed)
    losses: list[MicroBatchLoss] = []
    for number in range(chance.randrange(1, 30)):
        own = chance.random() < 0.3
        losses.append(
            MicroBatchLoss(
                worker=number,
                epoch=number // 2 + 1,
                step=chance.choice([7, 7, 7, 8, None]),
                micro_batch=100 + number if own else chance.choice([0, 0, None]),
                layers=(0, 1),
                own=own,
            )
        )
        assert blamed(losses) is None


def test_only_whoever_injects_faults_reads_which_ones() -> None:
    """A fault that was declared is treated as any other."""
    root = Path(elastic.__file__).parent
    allowed = {root / "host" / "rundir.py": 1}  # which removes those of an earlier run
    for path in sorted(root.rglob("*.py")):
        if path.parent != root / "chaos":
            assert path.read_text().count("faults.jsonl") == allowed.get(path, 0), path
