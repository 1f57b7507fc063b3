"""Tests float32 masters: against a plain loop with masters, on every layout, and what they are for."""

from __future__ import annotations

import pytest
import torch

from elastic.engine.probe import probe
from elastic.errors import TrainerError
from tests.engine import harness, mastered

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "clip_norm"),
    [
        ("bfloat16", None),
        pytest.param("bfloat16, average, momentum", None, marks=pytest.mark.long),
        pytest.param("bfloat16, initial state", None, marks=pytest.mark.long),
    ],
)
def test_one_worker_has_the_bits_of_a_plain_loop_with_masters(name: str, clip_norm: float | None) -> None:
    (found,) = harness.run(mastered.beside_plain, workers=1, args=(name, clip_norm))
    assert found == {"losses": True, "parameters": True, "masters": True}


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(mastered.CASES))
@pytest.mark.parametrize("layout", [(2, 2), (3, 1), (4, 2)])
def test_every_layout_has_the_same_masters(name: str, layout: tuple[int, int]) -> None:
    workers, stages = layout
    (alone,) = harness.run(mastered.train, workers=1, args=(name,))
    found = harness.run(mastered.train, workers=workers, stages=stages, args=(name,))
    assert alone["finer"] > 1000, "masters have what parameters cannot hold"
    for each in [alone, *found]:
        each.pop("bytes")
        assert each == {**alone, "unlike": 0}


@pytest.mark.long
def test_float16_gradients_are_divided_in_float32() -> None:
    """Divided by the loss scale in float16, most of this gradient would be 0 or have few bits."""
    fixed = {"loss": mastered.small, "loss_scale": 2.0**14}
    (own,) = harness.run(mastered.losses, workers=1, args=("float16, loss scale", fixed))
    wide = {**fixed, "model": mastered.models.blocks, "dtype": torch.float32, "loss_scale": None, "master_weights": False}
    (exact,) = harness.run(mastered.losses, workers=1, args=("float16, loss scale", wide))
    assert own == pytest.approx(exact, rel=2e-3)
    with pytest.raises(harness.WorkerError, match="NonFinite"):  # Adam's eps is 0 in float16
        harness.run(mastered.losses, workers=1, args=("float16, loss scale", {**fixed, "master_weights": False}))


@pytest.mark.long
def test_memory_of_masters() -> None:
    """A master takes 4 bytes an element beside Adam's 8; without masters Adam's states are bfloat16."""
    (own,) = harness.run(mastered.train, workers=1, args=("bfloat16", 2))
    (figures,) = own["bytes"]
    elements = figures["owned_parameter_bytes"] / 2
    assert figures["optimizer_bytes"] == pytest.approx(12 * elements, rel=0.02)


@pytest.mark.parametrize(("masters", "expected"), [(True, 12.0), (False, 4.0)])
def test_the_planner_counts_masters(masters: bool, expected: float) -> None:
    parameter = torch.nn.Parameter(torch.ones(300, 200, dtype=torch.bfloat16))
    assert probe(torch.optim.AdamW([parameter]), masters=masters).state_bytes == expected


def test_an_optimizer_with_masters_of_that_name_is_refused() -> None:
    class Own(torch.optim.SGD):
        def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["fp32_master"] = parameter.detach().float() - 1.0

    with pytest.raises(TrainerError, match=r"Own keeps a state called 'fp32_master'.* master_weights=True"):
        probe(Own([torch.nn.Parameter(torch.ones(300))]))
