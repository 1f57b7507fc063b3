"""Tests BatchNorm's running statistics: torch's own bits on every layout."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import harness
import models
import pytest
import torch
from test_oracle import plain
from torch import nn

import elastic
from elastic.engine.statistics import BUFFERS, Statistics
from elastic.errors import TrainerError

MICRO_BATCHES = 5


def two(kind: Any, channels: int, **options: Any) -> tuple[Any, Any]:
    """Two equal modules: plain torch runs one, and `Statistics` watches the other."""
    return kind(channels, **options), kind(channels, **options)


def contiguous(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape) * 3 + 1


def channels_last(shape: tuple[int, ...]) -> torch.Tensor:
    return contiguous(shape).contiguous(memory_format=torch.channels_last)


def turned(shape: tuple[int, ...]) -> torch.Tensor:
    return contiguous((shape[0], *shape[1:][::-1])).permute(0, *range(len(shape) - 1, 0, -1))


def strided(shape: tuple[int, ...]) -> torch.Tensor:
    return contiguous((shape[0], 2 * shape[1], *shape[2:]))[:, ::2]


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
@pytest.mark.parametrize(
    ("kind", "shape", "make", "dtype"),
    [
        (nn.BatchNorm1d, (16, 133), contiguous, torch.float32),
        (nn.BatchNorm1d, (16, 133), strided, torch.float32),
        (nn.BatchNorm1d, (5, 112, 11), turned, torch.float32),
        (nn.BatchNorm2d, (4, 137, 5, 7), contiguous, torch.float32),
        (nn.BatchNorm2d, (4, 137, 5, 7), channels_last, torch.float32),
        (nn.BatchNorm2d, (4, 137, 5, 7), strided, torch.float32),
        (nn.BatchNorm2d, (4, 137, 5, 7), contiguous, torch.bfloat16),
        (nn.BatchNorm2d, (4, 137, 5, 7), strided, torch.bfloat16),
        (nn.BatchNorm3d, (2, 108, 3, 4, 5), contiguous, torch.float32),
    ],
)
def test_the_bits_are_torchs(
    kind: Any, shape: tuple[int, ...], make: Callable[..., torch.Tensor], dtype: torch.dtype, momentum: float | None
) -> None:
    torch.manual_seed(1)
    theirs, ours = two(kind, shape[1], momentum=momentum)
    statistics = Statistics(nn.Sequential(ours), [ours])
    statistics.watch()
    for _ in range(3):
        statistics.begin()
        inputs = [make(shape).to(dtype) for _ in range(MICRO_BATCHES)]
        expected = [theirs(x) for x in inputs]
        before = [getattr(ours, name).clone() for name in BUFFERS]
        for micro_batch in (3, 0, 4, 2, 1):  # on any worker, in any order
            with statistics.during(0, micro_batch):
                assert torch.equal(ours(inputs[micro_batch]), expected[micro_batch])
        assert all(torch.equal(getattr(ours, name), value) for name, value in zip(BUFFERS, before, strict=True))
        halves = [statistics.of(part, [0]) for part in (range(2), range(2, MICRO_BATCHES))]
        told = [statistics.decode(statistics.encode(half)) for half in halves]
        statistics.apply(statistics.merged(told, MICRO_BATCHES))
        for name in BUFFERS:
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


@pytest.fixture
def watched() -> tuple[Any, Statistics]:
    layer = nn.Sequential(nn.BatchNorm1d(8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 8))
    statistics = Statistics(nn.Sequential(layer), [layer])
    statistics.watch()
    return layer, statistics


def test_what_is_computed_once_more_or_evaluated_or_fails_leaves_nothing(watched: tuple[Any, Statistics]) -> None:
    layer, statistics = watched
    assert statistics.names == ("0.0",)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with statistics.during(0, None):
        layer(torch.randn(4, 8))
    with pytest.raises(RuntimeError), statistics.during(0, 1):
        layer(torch.randn(4, 7))
    layer.eval()
    with statistics.during(0, 0):
        layer(torch.randn(4, 8))
    layer.train()
    assert statistics.of(range(9), [0]) == {(0, 0): ()}
    assert layer[0].momentum == 0.1
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
    layer(torch.randn(4, 8))  # outside a step it is an ordinary module
    assert layer[0].num_batches_tracked == 1


def test_several_calls_in_one_forward_count_in_their_order(watched: tuple[Any, Statistics]) -> None:
    layer, statistics = watched
    theirs = nn.BatchNorm1d(8)
    inputs = [torch.randn(4, 8) for _ in range(4)]
    for x in inputs:
        theirs(x)
    for micro_batch in (1, 0):
        with statistics.during(0, micro_batch):
            for x in inputs[2 * micro_batch : 2 * micro_batch + 2]:
                layer[0](x)
    statistics.apply(statistics.merged([statistics.of(range(2), [0])], 2))
    assert torch.equal(layer[0].running_var, theirs.running_var)
    assert layer[0].num_batches_tracked == 4


def test_a_micro_batch_that_nobody_tells_of_is_missed(watched: tuple[Any, Statistics]) -> None:
    layer, statistics = watched
    with statistics.during(0, 0):
        layer(torch.randn(4, 8))
    with pytest.raises(TrainerError, match=r"\(micro-batch, layer\) \[\(1, 0\)\] are missing"):
        statistics.merged([statistics.of(range(2), [0])], 2)


def build() -> list[nn.Module]:
    torch.manual_seed(3)
    return [
        nn.Linear(48, 48),
        nn.Sequential(nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 48, bias=False)),
        nn.Sequential(nn.BatchNorm1d(48, momentum=None), nn.ReLU()),
        models.Head(),
    ]


def buffers_of(layers: list[nn.Module]) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in nn.Sequential(*layers).named_buffers()}


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_training_equals_plain_torch_bit_for_bit(lone_job: Any, checkpoint: bool) -> None:
    layers, reference = build(), build()
    trainer = elastic.Trainer(
        layers, models.cross_entropy, models.adamw, models.Rows(), batch_size=24, micro_batch_size=4, seed=11, clip_norm=1e9,
        checkpoint_activations=checkpoint,
    )  # fmt: skip
    seen = [buffers_of(layers) for _ in trainer.run(3)]
    theirs = plain(reference, 3, 1e9)
    ours = [parameter for layer in layers for parameter in layer.parameters()]
    assert all(map(torch.equal, ours, theirs))
    assert buffers_of(layers).keys() == buffers_of(reference).keys()
    for name, buffer in buffers_of(reference).items():
        assert torch.equal(seen[-1][name], buffer), name
    assert seen[0]["1.0.num_batches_tracked"] == 6


def train(job: Any) -> Any:
    layers = build()
    trainer = elastic.Trainer(layers, models.cross_entropy, models.adamw, models.Rows(), batch_size=24, micro_batch_size=4, seed=11)
    losses = [report.loss for report in trainer.run(3)]
    evaluated = trainer.evaluate(models.Rows(), micro_batches=4)
    digest = trainer.digest()
    return losses, evaluated, digest, {name: buffer.tolist() for name, buffer in buffers_of(layers).items()}


@pytest.mark.slow
def test_every_layout_and_every_worker_has_the_same() -> None:
    (calm,) = harness.run(train, workers=1)
    for workers, stages in ((2, 1), (2, 2), (3, 2)):
        assert harness.run(train, workers=workers, stages=stages) == [calm] * workers


def _trained(layers: list[nn.Module]) -> Any:
    trainer = elastic.Trainer(
        layers, models.cross_entropy, models.adamw, models.Rows(), batch_size=24, micro_batch_size=4, seed=11, exact=False
    )
    list(trainer.run(3))
    return layers[1].mean.tolist()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]


def train_without_exactness(job: Any) -> Any:
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _trained([nn.Linear(48, 48), Average(), models.Head()])


class Average(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(48))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return x - self.mean


@pytest.mark.slow
def test_without_exactness_all_have_the_values_of_one_that_ran_the_layer() -> None:
    one, other = harness.run(train_without_exactness, workers=2, stages=2)
    assert one == other
    assert any(one)
    one, other = harness.run(train_without_exactness, workers=2, stages=1)
    assert one == other
