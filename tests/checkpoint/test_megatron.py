"""Tests Megatron's checkpoints, written by the real Megatron-Core, against what Megatron itself loads on one rank."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from elastic.checkpoint.convert.rules import parse_rules
from elastic.checkpoint.convert.run import Conversion, convert, open_any
from elastic.errors import CheckpointError
from tests.checkpoint.launch import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]
_PEER = Path(__file__).parent / "megatron_peer.py"
_CASES = {
    "mixed": {"tp": 2, "pp": 2, "swiglu": True, "tied": True, "bf16": True},
    "single": {"tp": 2, "pp": 1, "swiglu": False, "tied": False, "bf16": False},
}
_DIST_NAMES = {"self_attention.linear_qkv.layer_norm_": "input_layernorm.", "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm."}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """Directory, and what Megatron loads from it, by case; made when first asked for."""
    pytest.importorskip("megatron.core", reason="needs megatron-core")
    found: dict[str, tuple[Path, dict]] = {}

    def make(name: str) -> tuple[Path, dict]:
        if name not in found:
            root, case = tmp_path_factory.mktemp(name), _CASES[name]
            run_ranks(_PEER, {**case, "root": str(root)}, root / "save", case["tp"] * case["pp"])
            run_ranks(_PEER, {**case, "tp": 1, "pp": 1, "root": str(root), "record": str(root / "record.pt")}, root / "load", 1)
            found[name] = (root, torch.load(root / "record.pt", weights_only=True))
        return found[name]

    return make


def _by_model(name: str) -> str:
    """Returns the model's name of a tensor that has another name in `torch_dist`."""
    for dist, model in _DIST_NAMES.items():
        name = name.replace(dist, model)
    return name


def _equals(source, expected: dict) -> None:
    found = {_by_model(name): name for name in source.contents.tensors}
    assert set(found) == set(expected)
    for name, states in expected.items():
        assert set(source.contents.tensors[found[name]]) == set(states)
        for state, value in states.items():
            spec = source.contents.tensors[found[name]][state]
            assert (spec.shape, f"torch.{spec.dtype}") == (tuple(value.shape), str(value.dtype)), (name, state)
            assert torch.equal(source.read(found[name], state, 0, value.numel()), value.reshape(-1)), (name, state)
            low, high = value.numel() // 3, value.numel() // 2
            assert torch.equal(source.read(found[name], state, low, high), value.reshape(-1)[low:high]), (name, state)


@pytest.mark.parametrize("case", list(_CASES))
@pytest.mark.parametrize("kind", ["legacy", "torch_dist"])
def test_every_value_and_moment_is_what_megatron_loads(made, case, kind):
    root, record = made(case)
    detected, source = open_any(root / kind)
    assert detected.name == {"legacy": "megatron", "torch_dist": "megatron-dist"}[kind]
    _equals(source, record["before"])
    contents = source.contents
    assert contents.step == 3
    assert all(values == {"step": 3.0} for values in contents.scalars.values())
    assert [group.settings["wd_mult"] for group in contents.groups] == [1.0, 0.0]
    assert {name for group in contents.groups for name in group.names} == set(contents.tensors)
    assert contents.extra["megatron"]["args"]["num_query_groups"] == 2
    assert "agree" in source.verify()
    source.close()


@pytest.mark.parametrize("case", list(_CASES))
@pytest.mark.parametrize("kind", ["legacy", "torch_dist"])
def test_adam_goes_on_from_the_converted_file_with_megatrons_numbers(made, tmp_path, case, kind):
    root, record = made(case)
    convert(Conversion(source=root / kind, target=tmp_path / "elastic", to="elastic"))
    convert(Conversion(source=tmp_path / "elastic", target=tmp_path / "a.pt", to="torch"))
    tree = torch.load(tmp_path / "a.pt", weights_only=True)
    names = [name for group in tree["optimizer"]["param_groups"] for name in group["param_names"]]
    values = {name: torch.nn.Parameter(tree["model"][name]) for name in names}
    groups = [{"params": [values[name] for name in group["param_names"]]} for group in tree["optimizer"]["param_groups"]]
    optimizer = torch.optim.AdamW(groups)
    optimizer.load_state_dict(tree["optimizer"])
    mixed = record["before"][_by_model(names[0])]["param"].dtype == torch.float32 and _CASES[case]["bf16"]
    for value in values.values():
        seen = value.detach().bfloat16() if mixed else value.detach()
        value.grad = torch.sin(17 * seen.float()).to(seen.dtype).float()
    optimizer.step()
    for name, value in values.items():
        assert torch.equal(value, record["after"][_by_model(name)]["param"]), name
        assert torch.equal(optimizer.state[value]["exp_avg_sq"], record["after"][_by_model(name)]["exp_avg_sq"]), name


def test_query_key_and_value_are_taken_apart_by_rules(made):
    root, record = made("mixed")
    name, heads, groups, channels = "decoder.layers.1.self_attention.linear_qkv.weight", 4, 2, 4
    each = heads // groups
    parts = [f"{kind}.{group}" for group in range(groups) for kind in ("q", "k", "v")]
    widths = [each * channels, channels, channels] * groups
    merges = [{"names": [f"{kind}.{group}" for group in range(groups)], "dim": 0, "to": kind} for kind in ("q", "k", "v")]
    _, source = open_any(
        root / "legacy", rules=parse_rules({"split": [{"name": name, "dim": 0, "widths": widths, "to": parts}], "merge": merges})
    )
    whole = record["before"][name]["exp_avg"].reshape(groups, each + 2, channels, -1)
    expected = {"q": whole[:, :each], "k": whole[:, each], "v": whole[:, each + 1]}
    for kind, value in expected.items():
        assert torch.equal(source.read(kind, "exp_avg", 0, value.numel()), value.reshape(-1))
    assert math.prod(source.contents.tensors["q"]["param"].shape) == heads * channels * whole.shape[-1]
    source.close()


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ({"preset": "none"}, r"no rule states how .* is divided"),
        ({"shard": [{"regex": r".*linear_fc1\.weight", "dim": 0, "parts": [50]}]}, r"are not parts of widths \[50\]"),
        ({"shard": [{"regex": r".*linear_fc1\.weight", "dim": 2, "parts": [48]}]}, "in dimension 2"),
        ({"optimizer": {"groups": ["bias", ".*"]}}, "group 0 of the optimizer has"),
    ],
)
def test_a_layout_that_is_not_the_files_is_refused(made, rules, reason):
    root, _ = made("mixed")
    with pytest.raises(CheckpointError, match=reason):
        open_any(root / "legacy", rules=parse_rules(rules))


def test_a_fused_tensor_is_never_joined_as_if_it_were_plain(made):
    root, record = made("mixed")
    plain = parse_rules({"shard": [{"regex": r".*linear_fc1\.weight", "dim": 0, "parts": [48]}]})
    _, source = open_any(root / "legacy", rules=plain)
    value = record["before"]["decoder.layers.0.mlp.linear_fc1.weight"]["param"]
    assert not torch.equal(source.read("decoder.layers.0.mlp.linear_fc1.weight", "param", 0, value.numel()), value.reshape(-1))
    source.close()


def test_a_missing_rank_is_named(made, tmp_path):
    root, _ = made("mixed")
    for file in (root / "legacy" / "iter_0000003").glob("*/*.pt"):
        if file.parent.name != "mp_rank_01_001":
            (tmp_path / file.parent.name).mkdir()
            (tmp_path / file.parent.name / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="pipeline stage 1, tensor rank 1 is missing"):
        open_any(tmp_path)


@pytest.mark.parametrize("kind", ["legacy", "torch_dist"])
def test_the_optimizer_is_left_out_by_a_rule(made, kind):
    root, _ = made("single")
    _, source = open_any(root / kind, rules=parse_rules({"drop": ["optimizer"]}))
    assert all(set(states) == {"param"} for states in source.contents.tensors.values())
    assert not source.contents.groups
    source.close()
