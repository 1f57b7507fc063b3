"""Tests directories for `from_pretrained`: safetensors and `.bin`, stale files, adapters, metadata, ties, unknown dtypes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from elastic.checkpoint.commit import save
from elastic.checkpoint.convert.hf_weights import BIN, BIN_INDEX, INDEX, METADATA, SETS, SINGLE
from elastic.checkpoint.convert.rules import parse_rules
from elastic.checkpoint.convert.run import Conversion, convert, open_any, plan
from elastic.checkpoint.directory import newest
from elastic.checkpoint.state import PARAM, Contents, Spec
from elastic.checkpoint.store import LocalStore
from elastic.errors import CheckpointError


def put(folder: Path, name: str, value: float, names: str = "ab") -> None:
    """Writes one set of weights, all of the same value; an index gets one file per name."""
    folder.mkdir(exist_ok=True)
    write = torch.save if ".bin" in name else save_file
    if not name.endswith(".index.json"):
        write({key: torch.full((4,), value) for key in names}, folder / name)
        return
    mapping = {key: name.replace(".index.json", "").replace(".", f"-{at:05d}-of-00002.") for at, key in enumerate(names, 1)}
    for key, file in mapping.items():
        write({key: torch.full((4,), value)}, folder / file)
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": mapping}))


@pytest.mark.parametrize("name", SETS)
def test_every_set_of_weights_is_read_and_converted(tmp_path: Path, name: str) -> None:
    put(tmp_path / "a", name, 3.0)
    detected, source = open_any(tmp_path / "a")
    assert (detected.name, detected.why) == ("hf", f"it has a file {name}")
    assert [source.read(key, PARAM, 0, 4).tolist() for key in "ab"] == [[3.0] * 4] * 2
    assert source.contents.unread == ()
    source.close()
    convert(Conversion(source=tmp_path / "a", target=tmp_path / "b", to="elastic"))


@pytest.mark.parametrize("second", SETS[1:])
def test_the_set_that_from_pretrained_opens_counts_and_others_are_named(tmp_path: Path, second: str) -> None:
    put(tmp_path / "a", second, 1.0)
    put(tmp_path / "a", SINGLE, 2.0)
    _, source = open_any(tmp_path / "a")
    assert source.read("a", PARAM, 0, 4).tolist() == [2.0] * 4
    assert source.contents.unread == (f"{second}, because from_pretrained opens {SINGLE} instead",)
    source.close()
    outline = plan(Conversion(source=tmp_path / "a", target=tmp_path / "b", to="torch"))
    assert outline.unread == (f"{second}, because from_pretrained opens {SINGLE} instead",)


def test_an_index_of_bin_files_that_disagrees_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "a", BIN_INDEX, 1.0)
    torch.save({"a": torch.ones(4), "c": torch.ones(4)}, tmp_path / "a" / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(CheckpointError, match="disagree about c"):
        open_any(tmp_path / "a")


def test_ties_and_objects_of_a_bin_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    shared = torch.ones(4)
    torch.save({"w": shared, "head": shared, "note": "x"}, tmp_path / "a" / BIN)
    with pytest.raises(CheckpointError, match=r"note is not a tensor; drop it by a rule, drop = \['note'\]"):
        open_any(tmp_path / "a")
    for rules, unread in (({}, 1), ({"drop": ["note"]}, 0)):
        _, source = open_any(tmp_path / "a", rules=parse_rules(rules), lenient=True)
        assert (dict(source.contents.ties), len(source.contents.unread)) == ({"head": "w"}, unread)
        source.close()


@pytest.mark.parametrize("optimizer", ["optimizer.pt", "optimizer.bin"])
@pytest.mark.parametrize("name", [BIN, BIN_INDEX])
def test_an_optimizer_beside_bin_files_is_read(tmp_path: Path, name: str, optimizer: str) -> None:
    """A directory of Trainer or Accelerate of before safetensors."""
    put(tmp_path / "a", name, 1.0)
    parameters = [torch.nn.Parameter(torch.full((4,), 1.0)) for _ in "ab"]
    adam = torch.optim.Adam(parameters)
    for at, parameter in enumerate(parameters):
        parameter.grad = torch.full((4,), 1.0 + at)
    adam.step()
    torch.save(adam.state_dict(), tmp_path / "a" / optimizer)
    with pytest.raises(CheckpointError, match="by a rule"):
        open_any(tmp_path / "a")
    detected, source = open_any(tmp_path / "a", rules=parse_rules({"optimizer": {"groups": [".*"]}}))
    assert detected.name == ("trainer" if optimizer == "optimizer.pt" else "accelerate")
    for key, parameter in zip("ab", parameters, strict=True):
        assert torch.equal(source.read(key, "exp_avg", 0, 4), adam.state[parameter]["exp_avg"])
    source.close()


def test_an_adapter_stays_one(tmp_path: Path) -> None:
    put(tmp_path / "a", "adapter_model.safetensors", 2.0)
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    for there, back in (("elastic", "hf"), ("hf", "hf")):
        convert(Conversion(source=tmp_path / "a", target=tmp_path / f"{there}-there", to=there))
        target = tmp_path / f"{there}-back"
        convert(Conversion(source=tmp_path / f"{there}-there", target=target, to=back))
        assert sorted(path.name for path in target.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        assert json.loads((target / "adapter_config.json").read_text()) == {"peft_type": "LORA", "r": 4}
        assert load_file(target / "adapter_model.safetensors")["a"].tolist() == [2.0] * 4


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize("through", ["hf", "elastic", "dcp", "torch"])
def test_metadata_of_safetensors_is_kept(tmp_path: Path, through: str) -> None:
    (tmp_path / "a").mkdir()
    told = {"format": "pt", "modelspec.title": "größe", "trained": "yes"}
    save_file({"w": torch.ones(2)}, tmp_path / "a" / SINGLE, metadata=told)
    convert(Conversion(source=tmp_path / "a", target=tmp_path / "b", to=through))
    convert(Conversion(source=tmp_path / "b", target=tmp_path / "c", to="hf"))
    assert metadata(tmp_path / "c" / SINGLE) == told
    assert plan(Conversion(source=tmp_path / "a", target=tmp_path / "d", to="hf")).left_out == ()


def test_metadata_of_several_files_is_kept_or_named(tmp_path: Path) -> None:
    put(tmp_path / "a", INDEX, 1.0)
    for at, values in enumerate(({"same": "1", "other": "1"}, {"same": "1", "other": "2", "second": "3"}), 1):
        file = tmp_path / "a" / f"model-0000{at}-of-00002.safetensors"
        save_file(load_file(file), file, metadata=values)
    index = json.loads((tmp_path / "a" / INDEX).read_text())
    (tmp_path / "a" / INDEX).write_text(json.dumps({**index, "metadata": {"total_size": 32, "note": 1}}))
    _, source = open_any(tmp_path / "a")
    assert source.contents.extra[METADATA] == {"same": "1", "other": "1", "second": "3"}
    assert source.contents.unread == (
        f"{INDEX}: metadata 'note'",
        "model-00002-of-00002.safetensors: metadata 'other', which has another value in another file",
    )
    source.close()


class Tied:
    """A source of one value, tied to others."""

    format = "test"

    def __init__(self, ties: dict[str, str], config: dict[str, Any] | None) -> None:
        spec = Spec(shape=(4,), dtype="float32")
        extra = {} if config is None else {"config": config}
        self.contents = Contents(tensors={name: {PARAM: spec} for name in set(ties.values())}, ties=ties, extra=extra)

    def read(self, name: str, state: str, start: int, stop: int) -> torch.Tensor:
        return torch.full((stop - start,), float(len(name)))

    def close(self) -> None:
        pass


TIES = {"lm_head.weight": "model.embed.weight", "model.layers.1.mlp": "model.layers.0.mlp", "decoder.head": "model.embed.weight"}


@pytest.mark.parametrize(
    ("config", "left"),
    [
        (None, []),
        ({"tie_word_embeddings": False}, []),
        ({"tie_word_embeddings": True}, ["lm_head.weight"]),
    ],
)
def test_only_the_head_is_left_to_the_configuration(tmp_path: Path, config: dict[str, Any] | None, left: list[str]) -> None:
    from elastic.checkpoint.convert.hf import write_hf

    source = Tied(TIES, config)
    write_hf(source, tmp_path / "a")
    found = load_file(tmp_path / "a" / SINGLE)
    assert set(found) == {*TIES, *TIES.values()} - set(left)
    for name, target in TIES.items():
        assert name in left or torch.equal(found[name], found[target])


def test_a_conversion_that_loses_another_tie_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof at the end of a conversion expects no tied name to be missing but a head."""
    from elastic.checkpoint.convert import hf

    shared = torch.ones(4)
    torch.save({"w": shared, "again": shared}, tmp_path / "a.pt")
    monkeypatch.setattr(hf, "weights_to_write", lambda contents: {"w": hf.Leaf("w", PARAM, contents.tensors["w"][PARAM])})
    with pytest.raises(CheckpointError, match="again: only in the first"):
        convert(Conversion(source=tmp_path / "a.pt", target=tmp_path / "b", to="hf"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz])
def test_every_float8_is_read_and_written(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.arange(16, dtype=torch.uint8).view(dtype)
    (tmp_path / "a").mkdir()
    save_file({"w": values}, tmp_path / "a" / SINGLE)
    for at, to in enumerate(("elastic", "dcp", "torch", "hf")):
        convert(Conversion(source=tmp_path / "a", target=tmp_path / f"{at}", to=to))
        convert(Conversion(source=tmp_path / f"{at}", target=tmp_path / f"{at}-hf", to="hf"))
        found = load_file(tmp_path / f"{at}-hf" / SINGLE)["w"]
        assert found.dtype == dtype
        assert torch.equal(found.view(torch.uint8), values.view(torch.uint8))
    contents = Contents(tensors={"w": {PARAM: Spec(shape=(16,), dtype=str(dtype).removeprefix("torch."))}})
    save(LocalStore(tmp_path / "run"), contents, iter([("w", PARAM, 0, values)]), step=1)
    source = newest(LocalStore(tmp_path / "run"), verify=True)
    assert source is not None
    assert torch.equal(source.read("w", PARAM, 0, 16).view(torch.uint8), values.view(torch.uint8))


def test_a_dtype_that_is_not_read_is_named_and_the_rest_can_be_looked_at(tmp_path: Path) -> None:
    entries = {"w": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}, "v": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}
    text = json.dumps(entries).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(CheckpointError, match="w has unknown dtype 'F4'"):
        open_any(tmp_path / "x.safetensors")
    _, source = open_any(tmp_path / "x.safetensors", lenient=True)
    assert list(source.contents.tensors) == ["v"]
    assert "w has unknown dtype 'F4'" in source.contents.unread[0]
    source.close()
    _, source = open_any(tmp_path / "x.safetensors", rules=parse_rules({"drop": ["w"]}))
    assert (list(source.contents.tensors), source.contents.unread) == (["v"], ())
    source.close()
