"""Tests initial values from files: each worker reads its own layers, whatever the format and dtype; what does not fit is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import harness
import models
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import elastic
from elastic.errors import CheckpointError, TrainerError
from elastic.worker.trainer import Trainer

WIDTH = models.WIDTH
NAMES = {"0": "embed", "1.inner": "body.first", "1": "body", "2.linear": "head"}


class Base(nn.Module):
    """A layer with a parameter that nothing initialises, one that is not trained, and two buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.empty(WIDTH))
        self.fixed = nn.Parameter(torch.ones(WIDTH), requires_grad=False)
        self.register_buffer("kept", torch.zeros(3))
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x) * self.scale + self.fixed * self.table[1] * self.kept[0]


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


LAYERS = [lambda: nn.Linear(WIDTH, WIDTH), Base, Last]


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = {
        "embed.weight": (WIDTH, WIDTH), "embed.bias": (WIDTH,), "body.first.weight": (WIDTH, WIDTH), "body.first.bias": (WIDTH,),
        "body.scale": (WIDTH,), "body.fixed": (WIDTH,), "body.kept": (3,), "head.weight": (7, WIDTH), "head.bias": (7,),
    }  # fmt: skip
    return {name: (torch.randn(shape, generator=generator) * 0.1).bfloat16() for name, shape in shapes.items()}


def write(folder: Path, found: dict[str, torch.Tensor], *, files: int = 2) -> Path:
    """Writes a Hugging Face directory with an index."""
    folder.mkdir()
    names, mapping = list(found), {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = names[number::files]
        save_file({name: found[name] for name in part}, folder / file)
        mapping.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
    return folder


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write(tmp_path / "llm", tensors())


def trainer_of(weights: Any, model: Any = LAYERS, **options: Any) -> Trainer:
    given = {"names": NAMES, "seed": 3, **options}
    return elastic.Trainer(
        model, models.cross_entropy, models.adamw, models.Rows(), batch_size=24, micro_batch_size=4, weights=weights, **given
    )


def test_values_are_those_of_the_files_in_the_dtype_of_the_model(lone_job, weights: Path):
    trainer = trainer_of(weights)
    state, found = trainer.state_dict(), tensors()
    pairs = {"0.weight": "embed.weight", "1.inner.bias": "body.first.bias", "1.scale": "body.scale", "1.fixed": "body.fixed"}
    pairs |= {"1.kept": "body.kept", "2.linear.weight": "head.weight"}
    for own, stored in pairs.items():
        assert state[own].dtype is torch.float32
        assert torch.equal(state[own], found[stored].float()), own
    values = sum(each.nbytes for each in found.values())
    statistics = trainer.statistics()
    assert statistics is not None
    assert values <= statistics[0]["weights_bytes_read"] <= values + 64 * len(found)
    assert len(list(trainer.run(2))) == 2


def train(job: Any, weights: str) -> tuple[Any, ...]:
    trainer = trainer_of(weights)
    losses = [report.loss for report in trainer.run(2)]
    found = job.worker, trainer.digest()
    return *found, losses, trainer.statistics()


@pytest.mark.slow
@pytest.mark.long
def test_each_worker_reads_its_own_layers(weights: Path):
    ((_, digest, losses, _),) = harness.run(train, workers=1, args=(str(weights),))
    results = harness.run(train, workers=3, stages=3, args=(str(weights),))
    assert {(found[1], tuple(found[2])) for found in results} == {(digest, tuple(losses))}
    found = tensors()
    sizes = [sum(each.nbytes for name, each in found.items() if name.startswith(part)) for part in ("embed", "body", "head")]
    everywhere = found["body.fixed"].nbytes + found["body.kept"].nbytes
    sizes[1] -= everywhere
    replicas = [sizes[2], sizes[0], sizes[1]]  # without segments a worker keeps a copy of what another one owns
    for own, replica, worker in zip(sizes, replicas, results[0][3], strict=True):
        read = worker["weights_bytes_read"] - own - replica - everywhere
        assert 0 <= read <= 64 * len(found)


@pytest.mark.slow
def test_a_checkpoint_of_ours_gives_weights(lone_job, tmp_path: Path):
    def build() -> list[nn.Module]:
        return models.tied()

    before = trainer_of(None, build, names=None, checkpoint=tmp_path / "saved")
    assert len(list(before.run(2))) == 2
    after = trainer_of(tmp_path / "saved", build, names=None, seed=9)
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert after.step == 0


def test_tied_parameters_are_found_under_any_of_their_names(lone_job, tmp_path: Path):
    table = torch.randn(9, WIDTH)

    def build() -> list[nn.Module]:
        first, last = nn.Linear(WIDTH, 9, bias=False), nn.Linear(WIDTH, 9, bias=False)
        last.weight = first.weight
        return [nn.Sequential(first, nn.Linear(9, WIDTH)), last]

    rest = {"0.1.weight": torch.ones(WIDTH, 9), "0.1.bias": torch.zeros(WIDTH)}
    for number, name in enumerate(("0.0.weight", "1.weight")):
        trainer = trainer_of(write(tmp_path / str(number), {name: table, **rest}, files=1), build, names=None)
        assert torch.equal(trainer.state_dict()["1.weight"], table)
        assert torch.equal(trainer.state_dict()["0.0.weight"], table)


def _untied() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 9, bias=False), nn.Linear(9, WIDTH, bias=False), nn.Linear(WIDTH, 9, bias=False))


def _tied() -> nn.Sequential:
    made = _untied()
    made[2].weight = made[0].weight
    return made


@pytest.mark.parametrize("build", [_tied, _untied])
def test_files_that_tie_tensors_give_both_of_them_their_values(lone_job, tmp_path: Path, build: Any, recwarn: pytest.WarningsRecorder):
    values = _tied().state_dict()
    torch.save(values, tmp_path / "pytorch_model.bin")
    state = trainer_of(tmp_path, build, names=None).state_dict()
    assert all(torch.equal(state[name], value) for name, value in values.items())
    assert not [each for each in recwarn if "does not have" in str(each.message)]


def test_a_tied_parameter_whose_names_have_equal_tensors_in_the_files_is_read(lone_job, tmp_path: Path, recwarn: pytest.WarningsRecorder):
    values = {name: value.clone() for name, value in _tied().state_dict().items()}
    state = trainer_of(write(tmp_path / "equal", values), _tied, names=None).state_dict()
    assert torch.equal(state["2.weight"], values["2.weight"])
    assert not [each for each in recwarn if "does not have" in str(each.message)]


@pytest.mark.parametrize("other", [torch.ones(9, WIDTH), torch.ones(3)])
def test_a_tied_parameter_whose_names_have_different_tensors_in_the_files_is_refused(lone_job, tmp_path: Path, other: torch.Tensor):
    found = write(tmp_path / "other", {**_untied().state_dict(), "2.weight": other})
    with pytest.raises(CheckpointError, match=r"different tensors as 0.weight and 2.weight, which are one \(tied\) parameter of the model"):
        trainer_of(found, _tied, names=None)


class Codes(nn.Module):
    """A layer with frozen integers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.zeros(5000, dtype=dtype), requires_grad=False)
        self.linear = nn.Linear(WIDTH, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.codes.float().mean()


@pytest.mark.parametrize(
    ("dtype", "stored", "value"),
    [
        (torch.uint8, torch.int32, 300),
        (torch.uint8, torch.int8, -1),
        (torch.bool, torch.int8, 2),
        (torch.float16, torch.bfloat16, 65536),
        (torch.float32, torch.float64, 1e40),
        (torch.float8_e4m3fn, torch.float8_e5m2, 57344),
    ],
)
def test_a_value_that_the_dtype_of_the_model_cannot_hold_is_refused(lone_job, tmp_path: Path, dtype: Any, stored: Any, value: float):
    codes = torch.ones(5000).to(stored)
    codes[4000] = value
    found = {"0.codes": codes, "0.linear.weight": torch.ones(7, WIDTH), "0.linear.bias": torch.ones(7)}
    kinds = [str(each).removeprefix("torch.") for each in (dtype, stored)]
    says = rf"0.codes of the model is {kinds[0]}, which has no room for the value .* in the files: build the model .* theirs, {kinds[1]}"
    with pytest.raises(CheckpointError, match=says):
        trainer_of(write(tmp_path / "large", found), lambda: [Codes(dtype)], names=None).state_dict()
    codes[4000] = 1
    state = trainer_of(write(tmp_path / "small", found), lambda: [Codes(dtype)], names=None).state_dict()
    assert bool((state["0.codes"].float() == 1).all())


def test_infinite_values_are_read_as_they_are(lone_job, tmp_path: Path):
    codes = torch.full((5000,), float("inf"))
    found = {"0.codes": codes, "0.linear.weight": torch.ones(7, WIDTH), "0.linear.bias": torch.ones(7)}
    state = trainer_of(write(tmp_path / "infinite", found), lambda: [Codes(torch.float16)], names=None).state_dict()
    assert bool(state["0.codes"].isinf().all())


def _changed(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    found: dict[str, Any] = {**tensors(), **{name.replace("__", "."): value for name, value in changes.items()}}
    return {name: value for name, value in found.items() if value is not None}


REFUSED: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "shape": (_changed(head__weight=torch.ones(8, WIDTH)), r"2.linear.weight .*head.weight.* has shape \(7, 48\), and \(8, 48\)"),
    "missing": (_changed(head__bias=None, embed__bias=None), r"has no embed.bias \(0.bias of the model\), head.bias"),
    "integers": (_changed(embed__bias=torch.ones(WIDTH, dtype=torch.int64)), "0.bias of the model .* is float32, and int64 in the files"),
    "scaled": (
        _changed(embed__weight=torch.ones(WIDTH, WIDTH).to(torch.float8_e4m3fn), embed__weight_scale_inv=torch.ones(1)),
        "is float8_e4m3fn in the files, to be multiplied by embed.weight_scale_inv, which is not done here",
    ),
    "complex": (_changed(embed__bias=torch.ones(WIDTH, dtype=torch.complex64)), "is float32, and complex64 in the files"),
    "other names": ({"a": torch.ones(3)}, r"and 5 more, which the model has. Their names are such as 'a'. Give the Trainer names="),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_weights_that_do_not_fit_are_refused(lone_job, tmp_path: Path, kind: str):
    found, message = REFUSED[kind]
    with pytest.raises(CheckpointError, match=message):
        trainer_of(write(tmp_path / "other", found, files=1))


def test_what_is_no_directory_of_weights_is_refused(lone_job, tmp_path: Path, weights: Path):
    with pytest.raises(CheckpointError, match="there is no such file or directory on this host"):
        trainer_of(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"cannot be read: .* is not a checkpoint of a known format"):
        trainer_of(Path(__file__))
    with pytest.raises(TrainerError, match="given with a model that has values already"):
        trainer_of(weights, [nn.Linear(WIDTH, 7)], names=None)
    os.truncate(weights / "model-00001-of-00002.safetensors", 2_000)
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002.safetensors"):
        trainer_of(weights)


def test_tensors_that_the_model_lacks_are_named(lone_job, tmp_path: Path):
    folder = write(tmp_path / "more", _changed(extra=torch.ones(3)))
    with pytest.warns(UserWarning, match="has extra, which the model does not have: not read"):
        trainer_of(folder)
