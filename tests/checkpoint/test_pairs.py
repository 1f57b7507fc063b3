"""Tests every writable format against every other, there and back: the same bits, or a message with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from elastic.checkpoint.convert.compare import compare
from elastic.checkpoint.convert.formats import FORMATS, TARGETS, format_of
from elastic.checkpoint.convert.run import Conversion, convert, open_any, plan
from elastic.checkpoint.state import PARAM
from elastic.errors import CheckpointError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

READ_ONLY = {
    "megatron": "its files name no parameter of the optimizer, so only its own program can say that they are right",
    "megatron-dist": "its keys and common.pt are an optimizer's and a model's that only its own program builds",
    "deepspeed": "its shards fit one number of ranks; Universal is DeepSpeed's own form for any",
    "accelerate": "its optimizer numbers parameters in an order that its weights do not keep",
    "trainer": "its optimizer numbers parameters in an order that its weights do not keep",
}


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of torch: two groups and hyperparameters of each, several dtypes, a tie, a buffer, a frozen parameter, odd shapes."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"embed.weight": (11, 6), "h.0.weight": (6, 6), "h.0.bias": (6,), "h.1.scale": (), "frozen.weight": (3, 2)}
    model = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    model["h.0.weight"] = model["h.0.weight"].bfloat16()
    model["head.weight"], model["count"] = model["embed.weight"], torch.arange(3)
    groups = [
        {"lr": 0.1 + 0.2, "betas": (0.9, 0.95), "weight_decay": 0.1, "clip": float("inf"), "params": ["embed.weight", "h.0.weight"]},
        {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0, "clip": None, "params": ["h.1.scale", "h.0.bias"]},
    ]
    names = [name for group in groups for name in group["params"]]
    states = {
        name: {"step": torch.tensor(7.0), **{state: torch.randn(shapes[name], generator=generator) for state in ("exp_avg", "exp_avg_sq")}}
        for name in names
    }
    path = tmp_path_factory.mktemp("origin") / "a.pt"
    extra = {"step": 7, "scheduler": {"last": [0.5, float("nan")], "pair": (1, b"x")}}
    torch.save({"model": model, "optimizer": {"state": states, "param_groups": groups}, **extra}, path)
    return path


@pytest.fixture(scope="module")
def written(origin, tmp_path_factory):
    """That state in every format that is written."""
    root = tmp_path_factory.mktemp("written")
    for name in TARGETS:
        convert(Conversion(source=origin, target=root / name, to=name))
    return root


def _facts(contents, weights_only: bool):
    """Returns what must survive a round trip; a tie may become two tensors, since DCP and Hugging Face's directories have no ties."""
    tensors = {name: {s: spec for s, spec in states.items() if s == PARAM or not weights_only} for name, states in contents.tensors.items()}
    tensors |= {name: {PARAM: tensors[target][PARAM]} for name, target in contents.ties.items()}
    whole = (contents.scalars, tuple(contents.groups), contents.frozen - {"head.weight"}, contents.step)
    return tensors, contents.buffers, None if weights_only else whole


@pytest.mark.parametrize("through", TARGETS)
@pytest.mark.parametrize("form", TARGETS)
def test_there_and_back_is_bitwise(written, tmp_path, form, through):
    convert(Conversion(source=written / form, target=tmp_path / "there", to=through))
    convert(Conversion(source=tmp_path / "there", target=tmp_path / "back", to=form))
    weights_only = format_of(through).weights_only or format_of(form).weights_only
    (_, first), (_, last) = open_any(written / form), open_any(tmp_path / "back")
    assert _facts(first.contents, weights_only) == _facts(last.contents, weights_only)
    found = compare(first, last, limit=1 << 20, weights_only=weights_only, extra=not weights_only)
    assert not [difference for difference in found if not difference.equal]
    first.close()
    last.close()


def test_what_weights_alone_leave_out_is_said(written):
    outline = plan(Conversion(source=written / "dcp", target=written / "none", to="hf"))
    assert any("8 tensors of optimizer state" in text for text in outline.left_out)
    assert any("2 optimizer groups" in text for text in outline.left_out)


def test_every_format_is_written_or_has_a_reason(origin, tmp_path):
    assert set(FORMATS) - set(TARGETS) == set(READ_ONLY)
    for name in READ_ONLY:
        with pytest.raises(CheckpointError, match=f"no target format {name!r}"):
            Conversion(source=origin, target=tmp_path / "x", to=name)
