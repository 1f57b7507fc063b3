"""Tests DeepSpeed without ZeRO, from files with the keys that DeepSpeed 0.19.8 writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from elastic.checkpoint.convert.rules import parse_rules
from elastic.checkpoint.convert.run import Conversion, convert, open_any
from elastic.errors import CheckpointError


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, Any], torch.optim.Optimizer, nn.Module]:
    model = nn.ModuleDict({"in": nn.Linear(4, 2), "norm": nn.BatchNorm1d(7)})
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    buffers = [name for name, _ in model.named_buffers()]
    state = {
        "module": model.state_dict(), "buffer_names": buffers, "optimizer": optimizer.state_dict(), "param_shapes": None,
        "frozen_param_shapes": None, "shared_params": {}, "frozen_param_fragments": None, "lr_scheduler": None, "data_sampler": None,
        "random_ltd": None, "sparse_tensor_module_names": set(), "skipped_steps": 0, "global_steps": 5, "global_samples": 40,
        "dp_world_size": 1, "mp_world_size": 1, "ds_config": {"train_batch_size": 8}, "ds_version": "0.19.8", "note": "kept",
    }  # fmt: skip
    return tmp_path / "save", state, optimizer, model


def write(folder: Path, state: dict[str, Any], rank: int = 0) -> None:
    (folder / "global_step5").mkdir(parents=True, exist_ok=True)
    (folder / "latest").write_text("global_step5")
    torch.save(state, folder / "global_step5" / f"mp_rank_{rank:02d}_model_states.pt")


RULES = parse_rules({"optimizer": {"groups": [r"(weight|bias)$"]}})


def test_model_optimizer_buffers_and_the_rest_are_read(saved: Any, tmp_path: Path) -> None:
    folder, state, optimizer, model = saved
    write(folder, state)
    for at in (folder, folder / "global_step5"):
        detected, source = open_any(at, rules=RULES)
        contents = source.contents
        assert (detected.name, contents.step, contents.extra["deepspeed"]["note"]) == ("deepspeed", 5, "kept")
        assert contents.buffers == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
        for name, parameter in model.named_parameters():
            found = source.read(name, "exp_avg", 0, parameter.numel())
            assert torch.equal(found, optimizer.state[parameter]["exp_avg"].reshape(-1))
        source.close()
    for to in ("elastic", "deepspeed-universal", "torch"):
        convert(Conversion(source=folder, target=tmp_path / to, to=to, rules=RULES))


def test_what_is_not_of_this_kind_is_refused(saved: Any) -> None:
    folder, state, _, _ = saved
    write(folder, {**state, "param_shapes": [{"in.weight": torch.Size([2, 4])}], "optimizer": None})
    with pytest.raises(CheckpointError, match=r"saved with ZeRO, and the shards of its optimizer .* are missing"):
        open_any(folder)
    write(folder, {**state, "module": None})
    with pytest.raises(CheckpointError, match="pipeline without ZeRO"):
        open_any(folder)
    write(folder, {**state, "optimizer": {"fp32_groups_flat": [], "optimizer_state_dict": {}}})
    with pytest.raises(CheckpointError, match=r"flat vectors are not read: leave it out by the rule drop = .'optimizer'"):
        open_any(folder)
    _, source = open_any(folder, rules=parse_rules({"drop": ["optimizer"]}))
    assert source.contents.groups == ()
    source.close()
    write(folder, state)
    write(folder, state, rank=1)
    with pytest.raises(CheckpointError, match="2 tensor-parallel ranks"):
        open_any(folder)


def test_a_model_without_an_optimizer(saved: Any) -> None:
    folder, state, _, _ = saved
    write(folder, {**state, "optimizer": None})
    _, source = open_any(folder)
    assert (source.contents.groups, "in.weight" in source.contents.tensors) == ((), True)
    source.close()
