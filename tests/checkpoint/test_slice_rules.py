"""Tests rules for slices, and conversions by them: to slices, between slicings, and back to the original files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from elastic.checkpoint.cli import app
from elastic.checkpoint.commit import save
from elastic.checkpoint.convert.rules import load_rules, parse_rules
from elastic.checkpoint.convert.run import Conversion, convert, plan
from elastic.checkpoint.convert.slice_rules import parse_slice_rule, slicings_of
from elastic.checkpoint.directory import newest
from elastic.checkpoint.slices import Slicing
from elastic.checkpoint.state import PARAM, Contents, Spec
from elastic.checkpoint.store import LocalStore
from elastic.errors import CheckpointError
from tests.checkpoint.format_samples import contents_of, equals, values_at, whole_runs

SHAPES = {"embed": (50, 12), "h.0.qkv": (32, 12), "h.0.up": (24, 12), "h.0.down": (12, 24), "h.0.weight": (12,)}
VALUES = values_at(5, SHAPES)
RULES = """
[[slice]]
exact = "embed"
preset = "vocab"
multiple = 4

[[slice]]
regex = 'h\\.\\d+\\.qkv'
preset = "qkv"
heads = 8
kv_heads = 4
head_dim = 2

[[slice]]
regex = '.*\\.up'
preset = "gate_up"

[[slice]]
regex = '.*\\.down'
dim = 1
"""
UNEVEN = """
slice = [
  { exact = "embed", widths = [[30, 20]] },
  { exact = "h.0.qkv", preset = "qkv", heads = 8, kv_heads = 4, head_dim = 2, widths = [[10, 6], [2, 6], [8, 0]] },
  { exact = "h.0.down", dim = 1, parts = [8, 16], widths = [[1, 7], [16, 0]], whole = ["exp_avg_sq"] },
]
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save(LocalStore(tmp_path / "a"), contents_of(VALUES), whole_runs(VALUES), step=5)
    (tmp_path / "rules.toml").write_text(RULES)
    (tmp_path / "uneven.toml").write_text(UNEVEN)
    return tmp_path / "a"


def run(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def files(root: Path) -> dict[str, bytes]:
    """Returns the files of the one checkpoint in the directory, without the manifest."""
    (directory,) = root.glob("step-*")
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "manifest.json"}


def rule(**fields: Any) -> Any:
    return parse_slice_rule(fields)


@pytest.mark.parametrize(
    ("fields", "shape", "ranks", "expected"),
    [
        pytest.param({}, (8, 3), 4, Slicing(dim=0, widths=((2, 2, 2, 2),)), id="equal"),
        pytest.param({"dim": 1}, (8, 6), 2, Slicing(dim=1, widths=((3, 3),)), id="columns"),
        pytest.param({"parts": 2}, (8,), 2, Slicing(dim=0, widths=((2, 2), (2, 2))), id="equal parts"),
        pytest.param({"parts": [6, 2]}, (8,), 2, Slicing(dim=0, widths=((3, 3), (1, 1))), id="parts"),
        pytest.param({"widths": [[5, 3]]}, (8,), 2, Slicing(dim=0, widths=((5, 3),)), id="uneven"),
        pytest.param({"parts": [6, 2], "widths": [[6, 0], [1, 1]]}, (8,), 2, Slicing(dim=0, widths=((6, 0), (1, 1))), id="uneven parts"),
        pytest.param({"padded": 12}, (7, 2), 3, Slicing(dim=0, widths=((4, 3, 0),), padded=(4, 4, 4)), id="padded"),
        pytest.param({"multiple": 4}, (9,), 2, Slicing(dim=0, widths=((8, 1),), padded=(8, 8)), id="multiple"),
        pytest.param({"preset": "vocab", "multiple": 4, "dim": 1}, (2, 9), 2, Slicing(dim=1, widths=((8, 1),), padded=(8, 8)), id="vocab"),
        pytest.param({"preset": "gate_up"}, (8,), 2, Slicing(dim=0, widths=((2, 2), (2, 2))), id="gate and up"),
        pytest.param(
            {"preset": "qkv", "heads": 4, "kv_heads": 2, "head_dim": 3},
            (24, 5),
            2,
            Slicing(dim=0, widths=((6, 6), (3, 3), (3, 3))),
            id="query, key, value",
        ),
        pytest.param(
            {"preset": "qkv", "heads": 3, "kv_heads": 1, "head_dim": 2, "widths": [[4, 2], [2, 0], [0, 2]]},
            (10,),
            2,
            Slicing(dim=0, widths=((4, 2), (2, 0), (0, 2))),
            id="uneven heads",
        ),
    ],
)
def test_what_rules_make_of_a_tensor(fields: dict[str, Any], shape: tuple[int, ...], ranks: int, expected: Slicing) -> None:
    assert rule(regex=".*", **fields).slicing("a", shape, ranks) == expected


@pytest.mark.parametrize(
    ("fields", "shape", "ranks", "reason"),
    [
        ({}, (6,), 4, r"a of shape \[6\]: its part of 6 cannot be divided equally among 4 ranks; state widths"),
        (
            {"preset": "qkv", "heads": 8, "kv_heads": 2, "head_dim": 4},
            (48, 3),
            4,
            "part of 8 cannot .* 4 ranks in units of 4; state widths",
        ),
        ({"preset": "qkv", "heads": 8, "kv_heads": 2, "head_dim": 4}, (50,), 2, r"parts of \[32, 8, 8\] do not fill its dimension 0"),
        ({"preset": "gate_up"}, (7,), 2, "its dimension 0 is not 2 equal parts"),
        ({"dim": 1}, (8,), 2, r"a of shape \[8\] has no dimension 1"),
        ({}, (), 2, r"a of shape \[\] has no dimension 0"),
        ({"widths": [[5, 3]]}, (8,), 3, r"widths \[\[5, 3\]\] do not divide its parts of \[8\] among 3 ranks"),
        ({"widths": [[5, 3]]}, (9,), 2, "do not divide its parts"),
        ({"widths": [[5, 3]], "unit": 4}, (8,), 2, "not all multiples of 4"),
        ({"padded": 6}, (8,), 2, "8 cannot be padded to 6"),
        ({"padded": 9}, (8,), 2, "8 cannot be padded to 9 and divided among 2 ranks"),
    ],
)
def test_rules_that_do_not_fit_name_rule_and_tensor(fields: dict[str, Any], shape: tuple[int, ...], ranks: int, reason: str) -> None:
    with pytest.raises(
        CheckpointError, match=rf"rule slice 'x\.\*': {reason}" if reason.startswith("a of") else rf"'x\.\*': a of .*{reason}"
    ):
        rule(regex="x.*", **fields).slicing("a", shape, ranks)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "either exact or regex"),
        ({"exact": "a", "regex": "a"}, "either exact or regex"),
        ({"regex": "("}, "regular expression"),
        ({"regex": "a", "width": 3}, "has the unknown entry 'width'"),
        ({"regex": "a", "dim": -1}, "not be negative"),
        ({"regex": "a", "parts": []}, "positive numbers"),
        ({"regex": "a", "parts": [2, 0]}, "positive numbers"),
        ({"regex": "a", "widths": [[1, -1]]}, "not negative"),
        ({"regex": "a", "padded": 8, "multiple": 2}, "one part in equal shares"),
        ({"regex": "a", "padded": 8, "widths": [[4, 4]]}, "one part in equal shares"),
        ({"regex": "a", "preset": "moe"}, "no preset 'moe'; the presets are qkv, gate_up, vocab"),
        ({"regex": "a", "preset": "qkv", "heads": 3}, "preset qkv: .*missing"),
        ({"regex": "a", "preset": "vocab"}, "padded or multiple"),
        ({"regex": "a", "preset": "gate_up", "parts": 3}, "preset gate_up: .*unexpected"),
    ],
)
def test_rules_that_make_no_sense_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        parse_rules({"slice": [fields]})


def test_the_first_rule_counts_and_every_rule_must() -> None:
    contents = Contents(tensors={"a": {PARAM: Spec(shape=(8,), dtype="int8")}}, ties={"b": "a"})
    first, second, tied = rule(exact="a", widths=[[3, 5]]), rule(regex="."), rule(exact="b")
    assert slicings_of(contents, [first], 2) == {("a", PARAM): Slicing(dim=0, widths=((3, 5),))}
    with pytest.raises(CheckpointError, match=r"rule slice '\.' matches no tensor, or only tensors that an earlier rule slices"):
        slicings_of(contents, [first, second], 2)
    with pytest.raises(CheckpointError, match=r"'b' matches no tensor.*; b is tied to a: slice a"):
        slicings_of(contents, [first, tied], 2)
    assert slicings_of(contents, [first, tied], 1) == {}


def test_states_of_another_shape_are_sliced_only_if_a_rule_says_so() -> None:
    """Adafactor has one number for each row."""
    states = {PARAM: Spec(shape=(8, 4), dtype="int8"), "exp_avg_sq_row": Spec(shape=(8,), dtype="int8")}
    with pytest.raises(CheckpointError, match=r"rule slice 'a': exp_avg_sq_row of a has shape \[8\].*whole = \['exp_avg_sq_row'\]"):
        slicings_of(Contents(tensors={"a": states}), [rule(exact="a")], 2)
    found = slicings_of(Contents(tensors={"a": states}), [rule(exact="a", whole=["exp_.*_row"])], 2)
    assert list(found) == [("a", PARAM)]


def test_to_slices_to_other_slices_and_back_is_bitwise_the_same(source: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    assert "wrote 16 tensors" in run("convert", source, tmp_path / "b", "--to", "elastic", "--tensor-parallel", 4, "--rules", rules)
    assert "wrote 16" in run(
        "convert", tmp_path / "b", tmp_path / "c", "--to", "elastic", "--tensor-parallel", 2, "--rules", tmp_path / "uneven.toml"
    )
    assert "wrote 16" in run("convert", tmp_path / "c", tmp_path / "d", "--to", "elastic", "--tensor-parallel", 1, "--rules", rules)
    assert "wrote 16" in run("convert", tmp_path / "b", tmp_path / "e", "--to", "elastic")
    for whole in ("d", "e"):
        assert files(tmp_path / whole) == files(source)
    for each in "abcd":
        found = newest(LocalStore(tmp_path / each), verify=True)
        assert found is not None
        assert equals(found, VALUES)
        found.close()


def test_a_rank_finds_its_slices_in_its_own_files(source: Path, tmp_path: Path) -> None:
    run("convert", source, tmp_path / "b", "--to", "elastic", "--tensor-parallel", 2, "--rules", tmp_path / "uneven.toml")
    directory = tmp_path / "b" / "step-00000005"
    second = load_file(directory / "model-tp1-00001-of-00001.safetensors")
    assert second.keys() == {"embed", "h.0.qkv", "h.0.down"}
    query, key, _ = VALUES["h.0.qkv", PARAM].split([16, 8, 8])
    assert torch.equal(second["h.0.qkv"], torch.cat([query[10:], key[2:]]))
    assert torch.equal(second["h.0.down"], VALUES["h.0.down", PARAM][:, 1:8])
    assert "h.0.down/exp_avg_sq" in load_file(directory / "optimizer-00001-of-00001.safetensors")


def test_slices_are_inspected_verified_and_compared(source: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    text = run("convert", source, tmp_path / "b", "--to", "elastic", "--tensor-parallel", 2, "--rules", rules, "--dry-run")
    assert "would write 16" in text
    assert "dimension 0 by 2: 8+8 | 4+4 | 4+4" in text
    assert not (tmp_path / "b").exists()
    run("convert", source, tmp_path / "b", "--to", "elastic", "--tensor-parallel", 2, "--rules", rules)
    text = run("inspect", tmp_path / "b")
    for said in ("dimension 0 by 2: 28+22, padded to 28+28", "dimension 0 by 2: 8+8 | 4+4 | 4+4", "dimension 1 by 2: 12+12", "h.0.down"):
        assert said in text
    found = json.loads(run("inspect", tmp_path / "b", "--json"))["tensors"]
    assert found["embed"]["exp_avg"]["slicing"] == {"dim": 0, "widths": [[28, 22]], "padded": [28, 28]}
    assert "slicing" not in found["h.0.weight"][PARAM]
    assert "slicing" not in json.dumps(json.loads(run("inspect", source, "--json")))
    assert "every block agrees" in run("verify", tmp_path / "b")
    assert "0 different" in run("diff", source, tmp_path / "b")
    run("convert", tmp_path / "b", tmp_path / "c", "--to", "hf")
    weights = load_file(tmp_path / "c" / "model.safetensors")
    assert all(torch.equal(weights[name], VALUES[name, PARAM]) for name in SHAPES)


def test_renamed_and_split_tensors_are_sliced_under_their_new_names(source: Path, tmp_path: Path) -> None:
    split = {"name": "qkv", "dim": 0, "widths": [16, 16], "to": ["q", "kv"]}
    data = {"rename": [{"exact": "h.0.qkv", "to": "qkv"}], "split": [split], "slice": [{"exact": "kv", "parts": 2}]}
    (tmp_path / "rules.json").write_text(json.dumps(data))
    convert(Conversion(source=source, target=tmp_path / "b", to="elastic", rules=load_rules(tmp_path / "rules.json"), tensor_parallel=2))
    second = load_file(tmp_path / "b" / "step-00000005" / "model-tp1-00001-of-00001.safetensors")
    _, key, value = VALUES["h.0.qkv", PARAM].split([16, 8, 8])
    assert second.keys() == {"kv"}
    assert torch.equal(second["kv"], torch.cat([key[4:], value[4:]]))


def test_requests_that_do_not_fit_are_refused_and_nothing_is_written(source: Path, tmp_path: Path) -> None:
    rules = load_rules(tmp_path / "rules.toml")
    for fields, reason in (
        ({"to": "elastic", "rules": rules}, "set tensor_parallel"),
        ({"to": "elastic", "tensor_parallel": 2}, r"add \[\[slice\]\] rules"),
        ({"to": "elastic", "rules": rules, "tensor_parallel": 0}, "tensor_parallel is 0"),
        ({"to": "torch", "rules": rules, "tensor_parallel": 2}, "torch cannot hold tensor-parallel slices"),
        (
            {"to": "elastic", "rules": rules, "tensor_parallel": 3},
            r"rule slice 'h\\\\\.\\\\d\+\\\\.qkv': h.0.qkv of shape \[32, 12\].*16 .* 3 ranks",
        ),
    ):
        with pytest.raises(CheckpointError, match=reason):
            convert(Conversion(source=source, target=tmp_path / "b", **fields))
    assert not (tmp_path / "b").exists()
    assert plan(Conversion(source=source, target=tmp_path / "b", to="torch", rules=rules)).slicings == {}, (
        "rules for slices are for our format"
    )
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"bad\.json: a rules file is a table"):
        load_rules(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"bad\.json is not JSON"):
        load_rules(tmp_path / "bad.json")
