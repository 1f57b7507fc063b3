"""Tests commands that only read: they list the tensors of any file, and the parts that they cannot read."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from typer.testing import CliRunner

from elastic.checkpoint.cli import app
from elastic.checkpoint.convert.rules import load_rules, parse_rules
from elastic.checkpoint.convert.run import open_any
from elastic.errors import CheckpointError
from tests.checkpoint import peers

pytestmark = pytest.mark.filterwarnings("ignore")


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def looked(*arguments: object, code: int = 0) -> Any:
    return json.loads(run(*arguments, "--json", code=code))


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A file with objects beside the weights, in the model, and below other values."""
    module, optim = peers.trained()
    weights = {**module.state_dict(), "version": argparse.Namespace()}
    deep = {"seed": 3, "args": argparse.Namespace(lr=1e-3), "list": [argparse.Namespace()]}
    torch.save(
        {"model": weights, "optimizer": optim.state_dict(), "step": 7, "args": argparse.Namespace(), "deep": deep}, tmp_path / "a.pt"
    )
    return tmp_path / "a.pt"


@pytest.mark.parametrize("trust", [[], ["--trust-pickle"]])
def test_objects_are_listed_and_the_rest_is_read(odd: Path, trust: list[str]) -> None:
    found = looked("inspect", odd, *trust)
    assert sorted(found["tensors"]) == sorted(peers.model().state_dict())
    assert (found["step"], found["groups"]) == (7, [])
    told = [text.split(" ")[0] for text in found["unread"]]
    assert told == ["optimizer:", "args", "deep.args", "deep.list.0", "version"]
    assert looked("verify", odd, *trust)["unread"] == found["unread"]
    compared = looked("diff", odd, odd, *trust)
    assert (compared["different"], compared["unread"]["second"]) == ([], found["unread"])
    assert "not read of the first, so not compared: args is a argparse.Namespace" in run("diff", odd, odd, *trust)


def test_rules_leave_nothing_unread(odd: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.json"
    drop = ["args", r"deep\.(args|list)", "version"]
    rules.write_text(json.dumps({"drop": drop, "optimizer": {"groups": [r"^(0|3)\.weight$", ".*"]}}))
    found = looked("inspect", odd, "--rules", rules)
    assert (found["unread"], len(found["groups"])) == ([], 2)
    assert set(found["tensors"]["0.weight"]) == {"param", "exp_avg", "exp_avg_sq"}
    assert looked("verify", odd, "--rules", rules)["unread"] == []
    assert "agree" in looked("verify", odd, "--rules", rules)["checked"]
    assert looked("diff", odd, odd, "--rules", rules)["equal"] == len(found["tensors"]) * 3 + len(found["tensors"]) + 2 + 1
    run("convert", odd, tmp_path / "b", "--to", "elastic", "--rules", rules)
    assert "0 different" in run("diff", odd, tmp_path / "b", "--rules", rules)


def test_the_documented_rules_are_rules(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "converters.md").read_text().partition("## Rules")[2]
    lines = [line[4:] for line in text.partition("\n- ")[0].splitlines() if line.startswith("    ")]
    (tmp_path / "r.toml").write_text("\n".join(lines))
    rules = load_rules(tmp_path / "r.toml")
    assert all((rules.drop, rules.renames, rules.splits, rules.merges, rules.slices, rules.shards, rules.order.groups))


def test_diff_takes_rules_for_each(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    torch.save({"b": torch.ones(3)}, tmp_path / "b.pt")
    (tmp_path / "r.toml").write_text(
        "[[rename]]\nexact = 'a'\nto = 'b'\n[[split]]\nname = 'b'\ndim = 0\nwidths = [1, 2]\nto = ['c', 'd']\n"
    )
    (tmp_path / "s.toml").write_text("[[split]]\nname = 'b'\ndim = 0\nwidths = [1, 2]\nto = ['c', 'd']\n")
    assert looked("diff", tmp_path / "a.pt", tmp_path / "b.pt", code=1)["different"][0] == {"what": "a", "how": "only in the first"}
    both = ["--rules", tmp_path / "r.toml", "--rules", tmp_path / "s.toml"]
    assert looked("diff", tmp_path / "a.pt", tmp_path / "b.pt", *both) == {
        "equal": 3,
        "different": [],
        "unread": {"first": [], "second": []},
    }


def test_a_distributed_checkpoint_with_an_object(tmp_path: Path) -> None:
    dcp.save({"model": {"w": torch.ones(2)}, "args": argparse.Namespace(x=1)}, checkpoint_id=str(tmp_path / "a"), no_dist=True)
    found = looked("inspect", tmp_path / "a")
    assert list(found["tensors"]) == ["w"]
    assert [text.split(" ")[0] for text in found["unread"]] == ["args"]


@pytest.fixture
def gan(tmp_path: Path) -> Path:
    """Two optimizers, as Lightning saves them."""
    model = nn.ModuleDict({"G": nn.Linear(4, 4), "D": nn.Linear(4, 1)})
    optimizers = [torch.optim.Adam(model[name].parameters()) for name in ("G", "D")]
    model["D"](model["G"](torch.randn(2, 4))).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"state_dict": model.state_dict(), "optimizer_states": states, "global_step": 5}, tmp_path / "gan.ckpt")
    return tmp_path / "gan.ckpt"


def opened(path: Path, drop: list[str], **rules: Any) -> Any:
    _, source = open_any(path, rules=parse_rules({"drop": drop, **rules}))
    source.close()
    return source.contents


def test_all_but_one_optimizer_can_be_dropped(gan: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"several optimizers: .* such as drop = \['optimizer_states\\.1'\]"):
        opened(gan, [])
    first, second = torch.load(gan, weights_only=True)["optimizer_states"]
    for drop, name, states in ((r"optimizer_states\.1", "G", first), (r"optimizer_states\.0", "D", second)):
        contents = opened(gan, [drop])
        assert [group.names for group in contents.groups] == [(f"{name}.weight", f"{name}.bias")]
        run_rules = tmp_path / f"{name}.json"
        run_rules.write_text(json.dumps({"drop": [drop]}))
        run("convert", gan, tmp_path / f"{name}.pt", "--to", "torch", "--rules", run_rules)
        tree = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert len(tree["optimizer_states"]) == 1
        assert torch.equal(tree["optimizer_states"][0]["state"][0]["exp_avg"], states["state"][0]["exp_avg"])
        assert tree["global_step"] == 5
    for drop in ("optimizer", "optimizer_states", "optimizer_states.*"):
        contents = opened(gan, [drop])
        assert (contents.groups, sorted(contents.tensors)) == ((), ["D.bias", "D.weight", "G.bias", "G.weight"])
    found = looked("inspect", gan)
    assert len(found["tensors"]) == 4
    assert "several optimizers" in found["unread"][0]


def test_all_but_one_model_can_be_dropped(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "net": {"w": torch.zeros(3)}, "step": 1}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"several models: model, net; drop all but one by a rule, such as drop = \['net'\]"):
        opened(tmp_path / "a.pt", [])
    for drop, shape in (("net", (2,)), ("net.*", (2,)), ("model", (3,))):
        assert opened(tmp_path / "a.pt", [drop]).tensors["w"]["param"].shape == shape
    found = looked("inspect", tmp_path / "a.pt")
    assert sorted(found["tensors"]) == ["model.w", "net.w"]
    assert "several models" in found["unread"][0]
    assert "0 different" in run("diff", tmp_path / "a.pt", tmp_path / "a.pt")


EMA = {"state_dict": {"w": torch.zeros(1100, 1000)}, "state_dict_ema": {"w": torch.ones(1100, 1000)}, "rng": torch.arange(3), "epoch": 1}


@pytest.mark.parametrize(
    "rule",
    [
        {"regex": r"state_dict_ema\.(.*)", "to": r"ema.\1"},
        {"exact": "state_dict_ema.w", "to": "ema.w"},
    ],
)
def test_what_a_large_tensor_outside_of_the_model_is_advised_to_works(tmp_path: Path, rule: dict[str, str]) -> None:
    torch.save(EMA, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"drop = \['state_dict_ema'\], or move it .* regex = 'state_dict_ema\\.\(\.\*\)' to = 'NAME"):
        opened(tmp_path / "a.pt", [])
    _, source = open_any(tmp_path / "a.pt", rules=parse_rules({"rename": [rule]}))
    assert sorted(source.contents.tensors) == ["ema.w", "w"]
    assert source.read("ema.w", "param", 0, 5).tolist() == [1] * 5
    assert set(source.contents.extra) == {"rng", "epoch", "spelling"}
    source.close()
    assert sorted(opened(tmp_path / "a.pt", ["state_dict_ema"]).tensors) == ["w"]
    assert looked("inspect", tmp_path / "a.pt")["unread"][0].startswith("state_dict_ema.w is a float32 tensor of shape [1100, 1000]")


def test_a_rename_of_every_name_is_not_about_other_tensors(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "rng": torch.arange(3), "deep": {"rng": torch.arange(3)}}, tmp_path / "a.pt")
    contents = opened(tmp_path / "a.pt", [], rename=[{"regex": "(.*)", "to": r"m.\1"}])
    assert list(contents.tensors) == ["m.w"]
    assert {"rng", "deep"} <= set(contents.extra)


def test_a_value_that_contains_itself_is_refused(tmp_path: Path) -> None:
    loop: dict[str, Any] = {}
    loop["loop"] = loop
    torch.save({"model": {"w": torch.ones(2)}, "loop": loop}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="contains itself"):
        opened(tmp_path / "a.pt", [])
    assert list(opened(tmp_path / "a.pt", ["loop"]).tensors) == ["w"]


def test_verify_and_diff_tell_bytes_as_they_go(tmp_path: Path) -> None:
    from elastic.checkpoint.convert.compare import compare
    from elastic.checkpoint.convert.verify import size_of, verify

    torch.save({"model": {"w": torch.ones(1 << 16), "v": torch.ones(64, 64).t()}}, tmp_path / "a.pt")
    for to in ("elastic", "hf", "dcp", "torch", "deepspeed-universal"):
        run("convert", tmp_path / "a.pt", tmp_path / to, "--to", to)
        _, source = open_any(tmp_path / to)
        told: list[int] = []
        assert verify(source, limit=1 << 16, on_read=told.append)
        assert size_of(source) <= sum(told) <= 2 * size_of(source) + 20_000  # a header's block is read again
        assert len(told) > 1
        told.clear()
        assert all(found.equal for found in compare(source, source, limit=1 << 16, on_compared=told.append))
        assert sum(told) == size_of(source)
        source.close()
