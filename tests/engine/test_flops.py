"""Operations of models are counted as formulas say, and the peaks of devices are those that are published or measured."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from elastic.engine.flops import FlopCount, counted, flops_of
from elastic.engine.model import LayeredModel
from elastic.engine.numerics import Numerics
from elastic.engine.peak import measured, published
from elastic.engine.profile import measure
from elastic.engine.profile_apart import measure_apart
from elastic.observe.step_log import utilization
from elastic.plan.workload import LayerCost, Workload, costs

SAMPLES, WIDTHS = 8, (16, 32, 24, 4)
PRODUCTS = [2 * SAMPLES * before * after for before, after in pairwise(WIDTHS)]
WANTED = [2 * PRODUCTS[0], 0, 3 * PRODUCTS[1], 0, 3 * PRODUCTS[2]]
"""Of each layer: forward, the gradient of its parameters, and but for the first one that of its input."""


def layers() -> list[nn.Module]:
    made = [nn.Linear(before, after) for before, after in pairwise(WIDTHS)]
    return [made[0], nn.Tanh(), made[1], nn.Tanh(), made[2]]


def flops(found: list[list[Any]]) -> list[int]:
    return [each.flops for each in costs(found)]


def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
    return functional.cross_entropy(output, batch[1])


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(SAMPLES, WIDTHS[0]), torch.randint(0, WIDTHS[-1], (SAMPLES,))


@pytest.mark.parametrize("by", [measure, measure_apart])
def test_the_profile_counts_what_the_formula_says(by: Any) -> None:
    model = LayeredModel(nn.Sequential(*layers()))
    found = flops(by(model, loss, Numerics(seed=1), batch()))
    assert found == WANTED
    workload = Workload(
        layers=tuple(LayerCost(forward_s=0.1, backward_s=0.2, parameters=1, activation_bytes=8, flops=each) for each in found),
        micro_batches=4,
        grains=4,
    )
    assert workload.flops == 4 * sum(WANTED)
    assert Workload.from_json(workload.to_json()) == workload


@pytest.mark.parametrize("by", [measure, measure_apart])
def test_what_activation_checkpointing_computes_again_does_not_count(by: Any) -> None:
    model = LayeredModel(nn.Sequential(*layers()))
    assert flops(by(model, loss, Numerics(seed=1, checkpoint=lambda layer, module: True), batch())) == WANTED


@pytest.mark.parametrize("reentrant", [True, False])
def test_nor_does_that_of_a_model_of_its_own(reentrant: bool) -> None:
    inner, x = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)), torch.randn(8, 16, requires_grad=True)
    count = FlopCount()
    with counted(count):
        output: Any = checkpoint(inner, x, use_reentrant=reentrant)
        output.sum().backward()
    assert count.flops == 3 * 2 * (2 * 8 * 16 * 32)


def test_attention_and_convolutions_count() -> None:
    query = torch.randn(2, 4, 16, 8)
    count = FlopCount()
    with counted(count):
        functional.scaled_dot_product_attention(query, query, query)
        functional.conv2d(torch.randn(2, 3, 10, 10), torch.randn(8, 3, 3, 3))
    assert count.known
    assert count.flops == 2 * (2 * 2 * 4 * 16 * 16 * 8) + 2 * 2 * 8 * (8 * 8) * (3 * 3 * 3)


def test_where_a_part_is_unknown_nothing_is_said() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.LSTM(16, 16, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x[:, None])[0][:, 0]

    model = LayeredModel(nn.Sequential(Recurrent(), nn.Linear(16, 4)))
    assert flops(measure(model, loss, Numerics(seed=1), batch())) == [0, 0]
    assert flops_of([FlopCount(), FlopCount(known=False)]) == [0, 0]


def test_code_that_cannot_be_counted_is_measured_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no mode, please")

    monkeypatch.setattr(FlopCount, "__torch_dispatch__", refuses)
    model = LayeredModel(nn.Sequential(*layers()))
    for by in (measure, measure_apart):
        assert flops(by(model, loss, Numerics(seed=1), batch())) == [0] * 5
    assert all(parameter.grad is None for parameter in model.root.parameters())


class Block(nn.Module):
    """A module of the user's own: torch does not compile one of its own by itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_compiled_layers_count_and_stay_compiled() -> None:
    made = layers()
    runs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        return lambda *given: (runs.append(1), graph(*given))[1]

    made[2] = Block(made[2])
    made[2].compile(backend=backend, fullgraph=True)
    model = LayeredModel(nn.Sequential(*made))
    assert flops(measure(model, loss, Numerics(seed=1), batch())) == WANTED
    assert runs
    before = len(runs)
    made[2](torch.randn(SAMPLES, 32))
    assert len(runs) == before + 1
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.5),
        ("NVIDIA H100 PCIe", torch.float16, 756.5),
        ("NVIDIA H200", torch.float32, 67.0),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312.0),
        ("NVIDIA A10", torch.bfloat16, 125.0),
        ("Tesla V100-SXM2-16GB", torch.float16, 125.0),
        ("Tesla T4", torch.float16, 65.0),
        ("NVIDIA L40S", torch.float32, 91.6),
        ("Tesla V100-SXM2-16GB", torch.bfloat16, 0.0),
        ("NVIDIA A10G", torch.bfloat16, 0.0),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", torch.bfloat16, 0.0),
        ("NVIDIA A100-SXM4-80GB", torch.float64, 0.0),
        ("AMD Instinct MI300X", torch.bfloat16, 0.0),
    ],
)
def test_published_peaks(name: str, dtype: torch.dtype, tera: float) -> None:
    assert published(name, dtype, tensor32=False) == pytest.approx(tera * 1e12)


def test_float32_of_tensor_cores_has_a_peak_of_its_own() -> None:
    assert published("NVIDIA A100-SXM4-80GB", torch.float32, tensor32=True) == pytest.approx(156e12)
    assert published("Tesla T4", torch.float32, tensor32=True) == pytest.approx(8.1e12)


def test_the_peak_of_a_processor_is_the_best_rate_of_a_product() -> None:
    assert measured(torch.float32) > 1e8
    times = iter([0.0, 2e-5, 0.0, 1e-5, 0.0, 2e-5, 0.0, 27e-5, 0.0, 13.5e-5, 0.0, 27e-5])
    assert measured(torch.float32, lambda: next(times)) == pytest.approx(max(2 * 128**3 / 1e-5, 2 * 384**3 / 13.5e-5))


def test_a_type_that_is_slow_is_measured_with_a_small_product_only() -> None:
    times = iter([0.0, 1e-2, 0.0, 2e-2, 0.0, 3e-2])
    assert measured(torch.float16, lambda: next(times)) == pytest.approx(2 * 128**3 / 1e-2)


def test_utilization_is_unknown_where_a_part_of_it_is() -> None:
    assert utilization(50, 2.0, 100.0) == 0.25
    assert [utilization(0, 2.0, 100.0), utilization(50, None, 100.0), utilization(50, 2.0, 0.0)] == [None] * 3
