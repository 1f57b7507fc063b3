"""Tests trainings whose workers never have the whole model: the results depend neither on the layout, nor on when values are computed."""

from __future__ import annotations

from typing import Any

import harness
import models
import pytest
import torch
from test_oracle import plain
from torch import nn

import elastic
from elastic.errors import MismatchError, TrainerError
from elastic.worker.trainer import Trainer

WIDTH = models.WIDTH


class Wide(nn.Module):
    """A layer that is much larger than the others."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 5_000)
        self.back = nn.Linear(5_000, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.back(self.linear(x))


def adagrad(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(parameters, lr=0.05, initial_accumulator_value=0.1)


def normed() -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)), models.Block(), models.Head()]


CASES: dict[str, dict[str, Any]] = {
    "tied": {"model": models.tied, "optimizer": models.two_groups, "clip_norm": 0.3},
    "statistics, state at the beginning": {"model": normed, "optimizer": adagrad},
    "one function a layer": {"model": [lambda: nn.Linear(WIDTH, WIDTH), models.Block, models.Block, models.Head]},
    "frozen first layers": {"model": models.CASES["frozen first layers"]["model"]},
}


def made(job: Any, name: str) -> Trainer:
    options = {"optimizer": models.adamw, **CASES[name]}
    model, optimizer = options.pop("model"), options.pop("optimizer")
    data, loss = models.Rows(), models.cross_entropy
    torch.manual_seed(job.worker)  # has no effect
    return elastic.Trainer(model, loss, optimizer, data, batch_size=24, micro_batch_size=4, seed=11, **options)


def train(job: Any, name: str) -> tuple[Any, ...]:
    trainer = made(job, name)
    losses = [report.loss for report in trainer.run(3)]
    return losses, trainer.digest(), trainer.evaluate(models.Rows(), micro_batches=2)


@pytest.mark.slow
def test_bits_do_not_depend_on_the_layout(lone_job):
    assert harness.run(train, workers=2, stages=2, args=("tied",)) == [train(lone_job, "tied")] * 2


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_bits_do_not_depend_on_any_layout(name: str):
    alone = harness.run(train, workers=1, args=(name,))
    for workers, stages in ((3, 3), (4, 2)):
        assert harness.run(train, workers=workers, stages=stages, args=(name,)) == alone * workers


@pytest.mark.slow
def test_equals_plain_torch_with_the_same_initial_values(lone_job):
    def build() -> list[nn.Module]:
        return [nn.Linear(48, 48), models.Block(dropout=0.0), models.Head()]

    trainer = elastic.Trainer(
        build, models.cross_entropy, models.adamw, models.Rows(), batch_size=24, micro_batch_size=4, seed=11, clip_norm=1e9
    )
    layers = build()
    nn.ModuleList(layers).load_state_dict(trainer.state_dict())
    assert len(list(trainer.run(3))) == 3
    assert all(map(torch.equal, trainer.state_dict().values(), plain(layers, 3, 1e9)))


def own_memory(job: Any) -> tuple[int, int, int]:
    """Returns the bytes of all parameters in memory here while layers are measured, at most, and when training begins; and of all."""
    peak = [0]

    class Counting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            peak[0] = max(peak[0], held())
            return x

    def build() -> list[nn.Module]:
        return [nn.Linear(WIDTH, WIDTH), *(nn.Sequential(Counting(), Wide(), Counting()) for _ in range(4)), models.Head()]

    found: list[nn.Module] = []

    def noted() -> list[nn.Module]:
        found.extend(build())
        return found

    def held() -> int:
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for layer in found for each in layer.parameters()}
        return sum(storages.values())

    trainer = elastic.Trainer(noted, models.cross_entropy, models.adamw, models.Rows(), batch_size=24, micro_batch_size=4)
    measured, peak[0] = peak[0], 0
    beginning = held()
    assert len(list(trainer.run(1))) == 1
    return measured, beginning, sum(each.nbytes for layer in build() for each in layer.parameters())


@pytest.mark.slow
def test_one_layer_is_in_memory_while_layers_are_measured(lone_job):
    measured, beginning, whole = own_memory(lone_job)
    assert measured < 0.3 * whole
    assert 0.99 * whole < beginning < 1.01 * whole


@pytest.mark.slow
@pytest.mark.long
def test_a_worker_has_memory_for_its_own_layers_only():
    results = harness.run(own_memory, workers=2, stages=2)
    for number, (measured, beginning, whole) in enumerate(results):
        assert beginning < 0.55 * whole
        assert measured < 0.3 * whole if number == 0 else measured == 0
    assert sum(beginning for _, beginning, _ in results) < 1.01 * results[0][2]


def another(job: Any, difference: str) -> None:
    def build() -> list[nn.Module]:
        odd = job.worker == 1
        layers = [nn.Linear(WIDTH, WIDTH), models.Block(dropout=0.2 if odd and difference == "rate" else 0.1), models.Head()]
        if odd and difference == "shape":
            layers.insert(1, nn.Linear(WIDTH, WIDTH))
        nn.init.normal_(layers[0].weight, std=0.03 if odd and difference == "values" else 0.02)  # pyright: ignore[reportArgumentType]
        return layers

    elastic.Trainer(build, models.cross_entropy, models.adamw, models.Rows(), batch_size=24, micro_batch_size=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("difference", "place"),
    [
        ("shape", r"model\.(forms|layers)"),
        pytest.param("values", r"model\.initial\.layer 0", marks=pytest.mark.long),
        pytest.param("rate", r"model\.initial\.layer 1", marks=pytest.mark.long),
    ],
)
def test_another_model_on_another_worker_is_refused(difference: str, place: str):
    with pytest.raises(MismatchError, match=f"worker 1 cannot train together with worker 0: {place} .*build the same model"):
        harness.run(another, workers=2, stages=1, args=(difference,))


class Hidden(nn.Module):
    """Has a tensor where nobody finds it when the model is built."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, table = nn.Linear(WIDTH, WIDTH), torch.ones(WIDTH)
        self.table = lambda: table

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.table()


def test_a_layer_that_computes_with_a_tensor_that_stayed_without_values_is_named(lone_job):
    layers = [lambda: nn.Linear(WIDTH, WIDTH), Hidden, models.Head]
    with pytest.raises(TrainerError, match=r"layer 1 \(Hidden\) computes with a tensor .* has no values .*use register_buffer"):
        elastic.Trainer(layers, models.cross_entropy, models.adamw, models.Rows(), batch_size=24, micro_batch_size=4)


def test_an_optimizer_that_was_made_before_is_refused(lone_job):
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    with pytest.raises(TrainerError, match=r"optimizer is a AdamW, but the model is given by a function.*give a function that makes"):
        elastic.Trainer(models.blocks, models.cross_entropy, optimizer, models.Rows(), batch_size=24, micro_batch_size=4)
