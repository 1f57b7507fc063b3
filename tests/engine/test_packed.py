"""Tests several dtypes in a layer, float64, and frozen packed weights: on every layout, against plain torch, and in bytes."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import elastic
from elastic.engine.model import LayeredModel
from elastic.engine.partial import refuse_partial
from elastic.errors import TrainerError
from tests.engine import harness, models, packed

pytestmark = pytest.mark.slow


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(packed.CASES))
@pytest.mark.parametrize("layout", [(2, 2), (3, 1), (4, 2)])
def test_every_layout_has_the_same_bits(name: str, layout: tuple[int, int]) -> None:
    workers, stages = layout
    (alone,) = harness.run(packed.train, workers=1, args=(name,))
    found = harness.run(packed.train, workers=workers, stages=stages, args=(name,))
    for each in found:
        assert {key: each[key] for key in ("reports", "digest", "whole")} == {key: alone[key] for key in ("reports", "digest", "whole")}


@pytest.mark.parametrize("name", [pytest.param("mixed", marks=pytest.mark.long), "packed", pytest.param("double", marks=pytest.mark.long)])
def test_one_worker_has_the_bits_of_plain_torch(name: str) -> None:
    (found,) = harness.run(packed.beside_plain, workers=1, args=(name,))
    assert found == {"losses": True, "tensors": True}


def expected(layer: int, held: range) -> int:
    """Returns the bytes of a layer's untrained tensors on a worker with the layers `held`. Layer 4 shares a matrix of layer 1."""
    own = packed.FROZEN_BYTES if layer in (1, 2, 3) and layer in held else 0
    shared = packed.models.WIDTH * packed.WIDE if (layer == 1 and 4 in held and 1 not in held) or (layer == 4 and held) else 0
    return own + (shared if layer != 4 or {1, 4} & set(held) else 0)


@pytest.mark.parametrize("layout", [(2, 2), pytest.param((3, 3), marks=pytest.mark.long)])
def test_a_worker_holds_the_frozen_weights_of_its_stage(layout: tuple[int, int]) -> None:
    workers, stages = layout
    found: list[dict[str, Any]] = harness.run(packed.train, workers=workers, stages=stages, args=("packed", 2))
    for worker, each in enumerate(found):
        assert each["here"] == [expected(layer, each["layers"]) for layer in range(6)]
        vectors = sum(packed.FROZEN_BYTES for layer in (1, 2, 3) if layer in each["layers"])
        tied = 4 in each["layers"] and 1 not in each["layers"]
        assert found[0]["statistics"][worker]["frozen_bytes"] == vectors + tied * packed.models.WIDTH * packed.WIDE
    assert min(sum(each["here"]) for each in found) < 3 * packed.FROZEN_BYTES, "a worker of one stage has not all"


@pytest.mark.long
@pytest.mark.parametrize(("where", "what"), [("codes", "frozen parameter codes"), ("offset", "buffer offset")])
def test_a_change_of_packed_weights_is_refused(where: str, what: str) -> None:
    kind, _, leaf = what.rpartition(" ")
    with pytest.raises(harness.WorkerError, match=rf"{kind} 1\.{leaf} of layer 1 \(Packed\) was changed between two steps, before step 2"):
        harness.run(packed.careless, workers=1, args=(where,))


@pytest.mark.long
def test_a_state_dict_without_its_frozen_weights_is_refused() -> None:
    with pytest.raises(harness.WorkerError, match="not on this worker"):
        harness.run(packed.state_of, workers=2, stages=2)


def test_a_layer_of_buffers_alone_that_is_elsewhere_is_not_saved_empty() -> None:
    layers = [nn.Linear(4, 4), nn.Module()]
    layers[1].register_buffer("codes", torch.ones(5000, dtype=torch.uint8))
    model = LayeredModel(layers)
    refuse_partial(model.root)
    for held in ([0, 1, 2], [0]):
        model.hold(held, keep=len(held) == 3)
        assert layers[0].state_dict().keys() == {"weight", "bias"}
        with nullcontext() if 2 in held else pytest.raises(TrainerError, match="not on this worker"):
            assert layers[1].state_dict()["codes"].sum() == 5000


class Flags(nn.Module):
    """Has more frozen elements of a dtype that products do not take than trained ones."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(models.WIDTH, models.WIDTH)
        self.flags = nn.Parameter(torch.ones(9000).to(dtype), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.flags.float().mean()


@pytest.mark.parametrize("dtype", [torch.bool, torch.float8_e4m3fn])
def test_most_of_a_model_may_be_packed(lone_job: Any, dtype: torch.dtype) -> None:
    layers = [Flags(dtype), models.Head()]
    trainer = elastic.Trainer(layers, packed.loss, models.adamw, models.Rows(), batch_size=24, micro_batch_size=4)
    assert len(list(trainer.run(1))) == 1


@pytest.mark.long
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.usefixtures("leftovers")
def test_a_worker_reads_the_frozen_weights_of_its_stage_from_files(tmp_path: Path, masters: bool) -> None:
    torch.manual_seed(6)
    tensors = nn.Sequential(*(build() for build in packed.BUILDERS)).state_dict()
    save_file(tensors, tmp_path / "model.safetensors")
    arguments = [str(tmp_path), masters]
    alone = elastic.run("tests.engine.packed:from_files", workers=1, args=arguments).value
    found = elastic.run("tests.engine.packed:from_files", workers=2, stages=2, args=arguments).value
    assert {key: found[key] for key in ("losses", "digest", "whole")} == {key: alone[key] for key in ("losses", "digest", "whole")}
    assert found["whole"] == {name: tensors[name].double().sum().item() for name in found["whole"]}
    assert {"1.codes", "2.offset", "3.back", "2.scales"} <= found["whole"].keys()
    ends = sum(2 * 16 * each.element_size() for each in tensors.values())  # of every tensor, to compare files of hosts
    for each in found["statistics"]:
        own = sum(tensor.nbytes for name, tensor in tensors.items() if int(name[0]) in each["layers"])
        assert own <= each["weights_bytes_read"] <= own + ends
