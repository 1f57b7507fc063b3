"""Tests extra files of a checkpoint: listed in the manifest, kept by conversions, and sufficient for `from_pretrained`."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import elastic
from elastic.checkpoint.commit import begin, save
from elastic.checkpoint.convert.hf import open_hf
from elastic.checkpoint.convert.run import Conversion, convert, open_any
from elastic.checkpoint.directory import collect, newest
from elastic.checkpoint.plan import plan_files
from elastic.checkpoint.store import LocalStore
from elastic.errors import CheckpointError, TrainerError
from elastic.worker.extra_files import extra_files
from tests.checkpoint import pretrained
from tests.checkpoint.format_samples import contents_of, values_at, whole_runs

FILES = {"config.json": b'{"model_type": "gpt2"}', "merges.txt": b"", "tokenizer.model": os.urandom(300_000)}
VALUES = values_at(3, {"a": (9, 9)})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    contents = replace(contents_of(VALUES), files=FILES)
    return tmp_path / "run" / save(LocalStore(tmp_path / "run"), contents, whole_runs(VALUES), step=3)


def test_they_are_files_of_the_checkpoint(saved: Path) -> None:
    for name, data in FILES.items():
        assert (saved / name).read_bytes() == data
    source = newest(LocalStore(saved.parent), verify=True)
    assert source is not None
    assert source.contents.files == FILES
    assert set(FILES) <= set(source.manifest.files)


def test_a_damaged_one_is_found(saved: Path) -> None:
    data = bytearray(FILES["tokenizer.model"])
    data[270_000] ^= 1
    (saved / "tokenizer.model").write_bytes(data)
    source = newest(LocalStore(saved.parent))
    assert source is not None
    with pytest.raises(CheckpointError, match=r"tokenizer.model: damaged: bytes from 262144 on"):
        source.verify()
    with pytest.raises(CheckpointError, match=r"tokenizer.model: damaged"):
        _ = source.contents


def test_an_unfinished_save_is_collected_with_them(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    begin(store, plan_files(replace(contents_of(VALUES), files=FILES)), step=3)
    assert len(collect(store, older_than_s=0, now=time.time() + 60)) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["../config.json", "manifest.json", "model.safetensors.index.json", "weights.safetensors", ".json", "a/b.json"]
)
def test_names_that_are_ours_or_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="an extra file cannot be called"):
        plan_files(replace(contents_of(VALUES), files={name: b""}))


def test_conversions_carry_them(saved: Path, tmp_path: Path) -> None:
    convert(Conversion(source=saved, target=tmp_path / "hf", to="hf"))
    assert {name: (tmp_path / "hf" / name).read_bytes() for name in FILES} == FILES
    convert(Conversion(source=tmp_path / "hf", target=tmp_path / "back", to="elastic"))
    detected, source = open_any(tmp_path / "back")
    assert detected.name == "elastic"
    assert source.contents.files == FILES
    source.close()


def test_a_configuration_among_the_extra_values_becomes_a_file(tmp_path: Path) -> None:
    contents = replace(contents_of(VALUES), extra={"config": {"model_type": "x"}, "generation_config": 3}, files={})
    name = save(LocalStore(tmp_path / "a"), contents, whole_runs(VALUES), step=3)
    convert(Conversion(source=tmp_path / "a" / name, target=tmp_path / "b", to="elastic"))
    source = newest(LocalStore(tmp_path / "b"))
    assert source is not None
    assert {name: json.loads(data) for name, data in source.contents.files.items()} == {"config.json": {"model_type": "x"}}


def test_what_a_model_says_of_itself_and_what_is_given(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"{}")
    found = extra_files(pretrained.Tiny(), {"tokenizer.json": tmp_path / "t", "a.txt": "ß", "b.model": b"\0"})
    assert json.loads(found.pop("config.json")) == {
        "model_type": "tiny",
        "tie_word_embeddings": False,
        "note": "größe",
        "architectures": ["Tiny"],
    }
    assert found == {"tokenizer.json": b"{}", "a.txt": "ß".encode(), "b.model": b"\0"}
    assert extra_files(pretrained.Tiny(), {"config.json": "{}"}) == {"config.json": b"{}"}
    assert extra_files(torch.nn.Linear(1, 1), {}) == {}
    with pytest.raises(TrainerError, match=r"nowhere, for tokenizer.json, cannot be read: No such file"):
        extra_files(None, {"tokenizer.json": tmp_path / "nowhere"})
    with pytest.raises(TrainerError, match=r"a.json is a dict; give its content"):
        extra_files(None, {"a.json": {}})  # pyright: ignore[reportArgumentType]


def trained(kind: str, tmp_path: Path, **layout: int) -> tuple[Path, str]:
    """The step directory of a job, and the digest of its logits."""
    (tmp_path / "tokenizer").write_text("{}")
    value = elastic.run(pretrained.train, args=[kind, str(tmp_path / "run"), str(tmp_path / "tokenizer")], **layout).value
    return tmp_path / "run" / "step-00000002", value


@pytest.mark.slow
@pytest.mark.usefixtures("leftovers")
def test_a_job_writes_them(tmp_path: Path) -> None:
    directory, _ = trained("tiny", tmp_path, workers=2)
    source = open_hf(directory)
    assert sorted(source.contents.files) == ["config.json", "spiece.model", "tokenizer.json", "vocab.txt"]
    assert json.loads(source.contents.files["config.json"])["architectures"] == ["Tiny"]
    source.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_transformers_opens_what_a_job_saved(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    directory, logits = trained(kind, tmp_path, workers=2)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert type(model).__name__ == kind
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        assert pretrained.digest(model.eval()(pretrained.tokens(0, 0)).logits) == logits
