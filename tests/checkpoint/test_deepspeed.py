"""Tests DeepSpeed's checkpoints, written by DeepSpeed in its own processes, against the state that its engine reported."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from elastic.checkpoint.convert.deepspeed import detect, open_source, write
from elastic.checkpoint.convert.rules import parse_rules
from elastic.errors import CheckpointError
from tests.checkpoint.launch import run_ranks

pytestmark = pytest.mark.slow
_PEER = Path(__file__).parent / "deepspeed_peer.py"
_CASES = {
    "one": {"stage": 1, "bf16": False, "steps": 5},
    "two": {"stage": 2, "zero": {"round_robin_gradients": True}, "schedule": True},
    "three": {"stage": 3, "zero": {"sub_group_size": 50}},
    "bf16": {"stage": 1, "config": {"data_types": {"grad_accum_dtype": "fp32"}}},
}


def _run(case: dict, folder: Path, ranks: int = 2) -> dict:
    run_ranks(_PEER, {**case, "record": str(folder / "record.pt")}, folder, ranks)
    return torch.load(folder / "record.pt", weights_only=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """Checkpoints by case, made when first asked for."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    root = tmp_path_factory.mktemp("deepspeed")
    found: dict[str, tuple[Path, dict]] = {}

    def make(name: str) -> tuple[Path, dict]:
        if name not in found:
            record = _run({"save": str(root / name), "save_at": 3, **_CASES[name]}, root / f"run-{name}")
            found[name] = (root / name, record)
        return found[name]

    return make


def _equals(source, record: dict) -> None:
    for name, states in record["states"].items():
        for state, value in states.items():
            assert torch.equal(source.read(name, state, 0, value.numel()), value), (name, state)
            low, high = value.numel() // 3, value.numel() // 2
            assert torch.equal(source.read(name, state, low, high), value[low:high]), (name, state)


@pytest.mark.parametrize("name", list(_CASES))
def test_every_master_value_and_moment_is_the_engines(made, name):
    folder, record = made(name)
    assert detect(folder) == "deepspeed"
    source = open_source(folder)
    _equals(source, record)
    contents = source.contents
    assert contents.step == 3
    assert contents.ties == {"head.weight": "embed.weight"}
    assert contents.frozen == {"frozen.weight", "frozen.bias"}
    assert contents.buffers == {"scale"}
    assert [group.settings["weight_decay"] for group in contents.groups] == [0.1, 0.0]
    assert all(contents.scalars[name] == {"step": 3.0} for name in record["states"])
    assert {name for group in contents.groups for name in group.names} == set(record["states"])
    assert contents.extra["deepspeed"]["note"] == "kept"


@pytest.mark.parametrize("name", list(_CASES))
def test_universal_there_and_back(made, name, tmp_path):
    folder, record = made(name)
    source = open_source(folder)
    write(source, tmp_path / "u", max_memory=4096)
    again = open_source(tmp_path / "u")
    assert again.format == "deepspeed-universal"
    _equals(again, record)
    first, second = source.contents, again.contents
    for field in ("tensors", "scalars", "groups", "ties", "frozen", "buffers", "step"):
        assert getattr(second, field) == getattr(first, field), field
    for name in first.frozen | first.buffers:
        size = math.prod(first.tensors[name]["param"].shape)
        assert torch.equal(again.read(name, "param", 0, size), source.read(name, "param", 0, size))
    with pytest.raises(CheckpointError, match="exists"):
        write(source, tmp_path / "u", max_memory=4096)


def test_without_zero_the_optimizer_is_torch_s(made, tmp_path):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    case = {"stage": 0, "bf16": False, "save": str(tmp_path / "save"), "save_at": 3}
    record = _run(case, tmp_path / "run")
    with pytest.raises(CheckpointError, match="by a rule"):
        open_source(tmp_path / "save")
    deep = [name for name, states in record["states"].items() if "weight" in name and "norm" not in name]
    flat = [name for name in record["states"] if name not in deep]
    for at in (tmp_path / "save", tmp_path / "save" / "t"):
        assert detect(at) == "deepspeed"
        source = open_source(at, rules=parse_rules({"optimizer": {"names": [deep, flat]}}))
        _equals(source, record)
        contents = source.contents
        assert (contents.step, contents.ties, contents.buffers) == (3, {"head.weight": "embed.weight"}, {"scale"})
        assert contents.frozen == {"frozen.weight", "frozen.bias"}
        assert [group.settings["weight_decay"] for group in contents.groups] == [0.1, 0.0]
        assert contents.extra["deepspeed"]["note"] == "kept"
        assert "agree" in source.verify()
        source.close()


def test_deepspeed_goes_on_from_our_universal_with_the_same_numbers(made, tmp_path):
    folder, record = made("one")
    write(open_source(folder), tmp_path / "u", max_memory=1 << 20)
    config = {"config": {"checkpoint": {"load_universal": True}}}
    case = {**_CASES["one"], **config, "load": str(tmp_path), "load_tag": "u", "first": 3, "steps": 2}
    resumed = _run(case, tmp_path / "run")
    assert resumed["losses"] == record["losses"][3:]
    assert resumed["steps"] == 5
    assert [group["lr"] for group in resumed["groups"]] == [0.01, 0.02]


def test_a_pipeline_of_two_stages_is_one_model(made, tmp_path):
    case = {"stage": 1, "pipe": True, "save": str(tmp_path / "save"), "save_at": 3}
    record = _run(case, tmp_path / "run")
    assert any((tmp_path / "save" / "t").glob("bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt"))
    source = open_source(tmp_path / "save")
    other = torch.load(tmp_path / "run" / "record.pt1", weights_only=False)
    shared = set(record["states"]) & set(other["states"])
    assert shared == {"tied_modules.embed.weight"}
    for told in (record, other):
        _equals(source, told)
    assert set(source.contents.tensors) == {*record["states"], *other["states"], "1.scale", "2.scale", "3.scale"}
    assert source.contents.buffers == {"1.scale", "2.scale", "3.scale"}
    assert {name for group in source.contents.groups for name in group.names} == {*record["states"], *other["states"]}
    source.close()


def test_a_missing_shard_is_named(made, tmp_path):
    folder, _ = made("three")
    for path in (folder / "t").iterdir():
        if "pp_rank_1" not in path.name or "optim" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match="2 ranks, but has shards of 1"):
        open_source(tmp_path)
