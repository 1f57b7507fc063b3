"""Tests that checkpoints of a model cut into layers use the model's own names: weights, optimizer state and manifest."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import nn

import elastic
from elastic.checkpoint.directory import newest
from elastic.checkpoint.store import LocalStore
from elastic.errors import CheckpointError, TrainerError
from elastic.worker.naming import Naming, naming_of
from tests.checkpoint import named


def layers(model: named.Language) -> nn.ModuleList:
    return nn.ModuleList(model.layers())


def test_the_module_that_layers_are_of_names_them() -> None:
    model = named.build()
    saved = naming_of(layers(model), model).saved
    assert saved["0.weight"] == "body.embed.weight"
    assert saved["2.mlp.0.bias"] == "body.blocks.1.mlp.0.bias"
    assert (saved["4.scale"], saved["4.shift"]) == ("head.scale", "head.shift")
    assert {*saved.values(), "head.out.weight"} == set(model.state_dict())


def test_wrapped_modules_and_parameters_are_found_by_identity() -> None:
    model = named.build()

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.deep = nn.ModuleDict({"x": inner})

    first, *others = model.layers()
    saved = naming_of(nn.ModuleList([first, *map(Wrapped, others)]), model).saved
    assert saved["1.deep.x.norm.bias"] == "body.blocks.0.norm.bias"


def test_a_mapping_names_parameters_or_whole_modules() -> None:
    root = layers(named.build())
    saved = naming_of(root, {"0": "wte", "1": "h.0", "1.norm": "h.0.ln", "4.scale": "s"}).saved
    assert saved["0.weight"] == "wte.weight"
    assert (saved["1.mlp.0.weight"], saved["1.norm.weight"]) == ("h.0.mlp.0.weight", "h.0.ln.weight")
    assert (saved["4.scale"], saved["4.shift"], saved["2.norm.bias"]) == ("s", "4.shift", "2.norm.bias")
    assert naming_of(root, lambda name: f"m.{name}").saved["4.scale"] == "m.4.scale"


class Own(nn.Sequential):
    """Gives its parameters other names than its modules have."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return OrderedDict((name.replace("0.", "embed."), value) for name, value in super().state_dict(*args, **kwargs).items())


def test_a_sequential_that_renames_its_state_dict_is_followed() -> None:
    model = Own(nn.Linear(2, 2), nn.BatchNorm1d(2))
    saved = naming_of(model).saved
    assert saved["0.weight"] == "embed.weight"
    assert saved["1.running_mean"] == "1.running_mean"
    assert not naming_of(nn.Sequential(nn.Linear(2, 2))).changes
    assert naming_of(model).digest != naming_of(nn.Sequential(*model)).digest


def other(model: named.Language) -> nn.ModuleList:
    return nn.ModuleList([*model.layers(), nn.Linear(2, 2)])


@pytest.mark.parametrize(
    ("make", "names", "reason"),
    [
        (other, "model", r"5\.weight in the list of layers is not in the Language given as names"),
        (lambda m: nn.ModuleList(m.layers()[:-1]), "model", r"no layer has head\.scale of the Language .*\(2 such names\)"),
        (layers, {"0": "x", "9.weight": "y"}, r"the model has no 9\.weight; it has names such as 0\.weight"),
        (layers, {"1": "x", "2": "x"}, r"1\.norm\.weight and 2\.norm\.weight would both be called x\.norm\.weight"),
        (layers, {"0.weight": "4.scale"}, r"would both be called 4\.scale"),
        (layers, {"1": "2", "2": "1"}, r"which is another parameter's name"),
        (layers, lambda name: "a/b", "a name is text without a slash"),
        (layers, lambda name: None, "would be called None"),
        (layers, lambda name: "", "would be called ''"),
        (layers, 3, "names is a int"),
    ],
)
def test_names_that_do_not_fit_are_refused(make: Any, names: Any, reason: str) -> None:
    model = named.build()
    with pytest.raises(TrainerError, match=reason):
        naming_of(make(model), model if names == "model" else names)


@pytest.mark.slow
@pytest.mark.usefixtures("leftovers")
@pytest.mark.long
def test_jobs_save_and_go_on_under_the_model_s_names(tmp_path: Path) -> None:
    """A directory of before the names is gone on from, and so is one with them: with the bits of a job that was never interrupted."""
    plain, digests = tmp_path / "plain", []
    elastic.run(named.train, args=[str(tmp_path / "run"), False, 2], workers=2, stages=2)
    for steps in (4, 6):
        digests.append(elastic.run(named.train, args=[str(tmp_path / "run"), True, steps], workers=2, stages=2).value)
    assert digests[-1] == elastic.run(named.train, args=[str(plain), False, 6], workers=1).value
    check_files(tmp_path / "run" / "step-00000006", digests[-1])
    sources = [newest(LocalStore(tmp_path / "run")), newest(LocalStore(plain))]
    theirs, own = (source for source in sources if source is not None)
    model = named.build()
    names = naming_of(layers(model), model).saved
    assert set(theirs.contents.tensors) == set(names.values())
    assert [list(group.names) for group in theirs.contents.groups] == [[names[n] for n in group.names] for group in own.contents.groups]
    assert theirs.contents.frozen == {"head.scale"}
    assert theirs.contents.buffers == {"head.shift"}
    assert set(theirs.contents.scalars) == {names[name] for name in own.contents.scalars}
    with pytest.raises(CheckpointError, match=r"its parameters have names such as 'body\.blocks.*names="):
        elastic.run(named.train, args=[str(tmp_path / "run"), False, 8], workers=1)


def check_files(folder: Path, digest: str) -> None:
    """They hold the model's names and values."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    model = named.build()
    missing, unexpected = model.load_state_dict({name: value for name, value in found.items() if "/" not in name}, strict=False)
    assert (missing, unexpected) == (["head.out.weight"], [])  # it is tied
    root = layers(model)
    total = hashlib.sha256()
    for _, parameter in sorted(root.named_parameters()):
        total.update(parameter.detach().numpy().tobytes())
    assert total.hexdigest() == digest
    assert found["body.blocks.2.mlp.2.weight/exp_avg"].abs().sum() > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_transformers_opens_what_a_job_of_two_stages_saved(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    result = elastic.run(named.train_pretrained, args=[kind, str(tmp_path / "run")], workers=2, stages=2)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "step-00000002", output_loading_info=True)
    assert type(model).__name__ == kind
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    total = hashlib.sha256()
    for _, parameter in sorted(named.cut(model).named_parameters()):
        total.update(parameter.detach().numpy().tobytes())
    assert total.hexdigest() == result.value


def test_a_checkpoint_without_any_of_the_names_says_what_to_do() -> None:
    contents = SimpleNamespace(tensors={"a.weight": {}}, ties={})
    source: Any = SimpleNamespace(name="step-00000001", manifest=SimpleNamespace(contents=contents))
    with pytest.raises(CheckpointError, match=r"'a\.weight', and this model's such as '0\.weight' or 'b\.weight'.*names="):
        Naming(saved={"0.weight": "b.weight"}).inward(source)
