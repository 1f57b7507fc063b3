"""Tests the loss scale: torch's rules, and the same bits on every layout and through losses."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import elastic
from elastic.engine import loss_scale
from elastic.engine.loss_scale import LossScale
from elastic.errors import TrainerError
from tests.engine import harness, scaled

MODULE = "tests.engine.scaled"


@given(st.lists(st.booleans(), max_size=40))
def test_it_follows_the_rules_of_torch(finite: list[bool]) -> None:
    own = LossScale.of("dynamic")
    assert own is not None
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    peer = torch.amp.GradScaler("cpu", growth_interval=3)  # pyright: ignore[reportPrivateImportUsage]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_scale, "GROWS_AFTER", 3)
        for good in finite:
            assert own.value == peer.get_scale()
            peer.scale(torch.zeros(1))
            parameter.grad = torch.tensor([1.0 if good else torch.inf])
            peer.step(optimizer)
            peer.update()
            own.after(skipped=not good)


def test_a_fixed_scale_stays() -> None:
    own = LossScale.of(1024)
    assert own is not None
    own.after(skipped=True)
    assert (own.value, own.can_shrink) == (1024.0, False)


@pytest.mark.parametrize("value", [0, -1.0, 3.0, 1000, float("inf"), float("nan"), "static", True, [2.0]])
def test_bad_scales(value: Any) -> None:
    with pytest.raises(TrainerError, match=r"loss_scale=.*: use 'dynamic', or a power of two"):
        LossScale.of(value)


@pytest.mark.slow
@pytest.mark.long
def test_a_fixed_power_of_two_changes_no_bit() -> None:
    (plain,) = harness.run(scaled.exact, workers=1, args=(None,))
    (other,) = harness.run(scaled.exact, workers=1, args=(2.0**12,))
    assert other == plain


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(2, 2), pytest.param((3, 1), marks=pytest.mark.long), pytest.param((4, 2), marks=pytest.mark.long)])
def test_every_layout_takes_the_same_steps(layout: tuple[int, int]) -> None:
    (alone,) = harness.run(scaled.train, workers=1)
    workers, stages = layout
    assert harness.run(scaled.train, workers=workers, stages=stages) == [alone] * workers
    scales = [scale for *_, scale in alone["seen"]]
    skipped = [step for step, _, _, why, _ in alone["seen"] if why is not None]
    assert skipped[:2] == [0, 1], "the first scales are too large"
    assert alone["seen"][0][3] == "the gradient of step 0 is not finite with the loss scale 65536, which is halved"
    assert any(after > before for before, after in pairwise(scales)), "it grows again"


@pytest.mark.slow
@pytest.mark.long
def test_it_skips_the_steps_that_plain_torch_skips() -> None:
    (own,) = harness.run(scaled.train, workers=1, args=(0.0, scaled.BATCH))
    peer = scaled.plain()
    assert [(step, skipped is not None, scale) for step, _, _, skipped, scale in own["seen"]] == [(s, k, c) for s, _, k, c in peer]
    assert [loss for _, loss, *_ in own["seen"]] == pytest.approx([loss for _, loss, *_ in peer], rel=2e-3)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("leftovers")
def test_it_is_the_same_through_losses_and_checkpoints(tmp_path: Path) -> None:
    steps, saved = scaled.STEPS, str(tmp_path / "saved")
    alone = elastic.run(f"{MODULE}:train", workers=1).value
    through = elastic.run(f"{MODULE}:train", workers=3, args=[0.1, 4, steps, {"1": 3, "2": 9}])
    assert [incident["kind"] for incident in through.incidents if incident["kind"] == "death"] == ["death", "death"]
    assert through.value["digest"] == alone["digest"]
    first = elastic.run(f"{MODULE}:train", workers=2, args=[0.1, 4, 5, {}, saved]).value
    rest = elastic.run(f"{MODULE}:train", workers=3, args=[0.1, 4, steps, {}, saved]).value
    assert first["seen"] + rest["seen"] == alone["seen"]
    assert rest["digest"] == alone["digest"]
