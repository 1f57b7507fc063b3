"""Tests directories written by the real Accelerate: by one process, and in shards by two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from elastic.checkpoint.convert.numbered import Order
from elastic.checkpoint.convert.rules import Rules
from elastic.checkpoint.convert.run import Conversion, convert, open_any
from elastic.errors import CheckpointError
from tests.checkpoint import peers
from tests.checkpoint.launch import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]


def _saved(folder: Path, safe: bool):
    """A model and its optimizer after three steps, and the directory that Accelerate made of them."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    module = peers.model()
    optimizer = peers.optimizer(module)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    module, optimizer, schedule = accelerator.prepare(module, optimizer, schedule)
    for step in range(3):
        peers.train(module, optimizer, step)
        schedule.step()
    accelerator.save_state(str(folder), safe_serialization=safe)
    accelerator.free_memory()
    return module, optimizer.optimizer


def _names(module, optimizer) -> tuple[tuple[str, ...], ...]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return tuple(tuple(names[id(parameter)] for parameter in group["params"]) for group in optimizer.param_groups)


@pytest.mark.parametrize("safe", [True, False])
def test_a_state_of_one_process_goes_on_with_the_same_bits(tmp_path, safe):
    module, optimizer = _saved(tmp_path / "a", safe)
    with pytest.raises(CheckpointError, match="by a rule"):
        open_any(tmp_path / "a")
    order = Order(names=_names(module, optimizer)) if safe else Order(groups=("0.weight|3.weight", ".*"))
    rules = Rules(order=order)
    detected, source = open_any(tmp_path / "a", rules=rules)
    assert detected.name == "accelerate"
    assert source.contents.extra["scheduler"]["last_epoch"] == 3
    assert source.contents.extra["not_read"] == ["random_states_0.pkl"]
    assert "agree" in source.verify()
    source.close()
    convert(Conversion(source=tmp_path / "a", target=tmp_path / "b.pt", to="torch", rules=rules))
    tree = torch.load(tmp_path / "b.pt", weights_only=True)
    fresh = peers.model(seed=8)
    fresh.load_state_dict(tree["model"])
    restored = peers.optimizer(fresh, lr=5.0)
    restored.load_state_dict(tree["optimizer"])
    for pair in ((module, optimizer), (fresh, restored)):
        peers.train(*pair, 3)
    assert peers.bits(fresh) == peers.bits(module)


def test_several_models_are_refused(tmp_path):
    _saved(tmp_path / "a", True)
    (tmp_path / "a" / "model_1.safetensors").write_bytes((tmp_path / "a" / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"several models or optimizers \(model_1\.safetensors\)"):
        open_any(tmp_path / "a")


def test_shards_of_fsdp_are_what_torch_gathers(tmp_path):
    pytest.importorskip("accelerate", reason="needs accelerate")
    case = {"save": str(tmp_path / "a"), "record": str(tmp_path / "record.pt")}
    run_ranks(Path(__file__).parent / "accelerate_peer.py", case, tmp_path / "run", 2)
    weights, states = torch.load(tmp_path / "record.pt", weights_only=True)
    detected, source = open_any(tmp_path / "a")
    assert detected.name == "accelerate"
    for name, value in weights.items():
        for state, expected in {"param": value, **states["state"][name]}.items():
            if state != "step":
                assert torch.equal(source.read(name, state, 0, value.numel()), expected.reshape(-1)), (name, state)
    assert source.contents.scalars == {name: {"step": 2.0} for name in weights}
    assert [list(group.names) for group in source.contents.groups] == [group["params"] for group in states["param_groups"]]
    assert "agree" in source.verify()
    source.close()
