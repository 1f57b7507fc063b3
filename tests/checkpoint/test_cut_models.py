"""Tests jobs whose Trainer gets a model of transformers as it is, and what they save."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import elastic
from tests.checkpoint import cut_jobs

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_stages_have_the_bits_of_one_worker_and_transformers_opens_them(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    alone = elastic.run(cut_jobs.train, args=[kind, str(tmp_path / "a")], workers=1).value
    spread = elastic.run(cut_jobs.train, args=[kind, str(tmp_path / "b")], workers=3, stages=2).value
    assert alone[:2] == spread[:2]
    assert spread[2].count("]") == 2
    for name in "ab":
        model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name / "step-00000002", output_loading_info=True)
        assert type(model).__name__ == kind
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert cut_jobs.digest(model) == alone[1]


def test_adapters_are_trained_in_stages_and_base_weights_stay(tmp_path: Path) -> None:
    for package in ("transformers", "peft"):
        pytest.importorskip(package, reason=f"needs {package}")
    alone = elastic.run(cut_jobs.train_adapters, args=[str(tmp_path / "a")], workers=1).value
    spread = elastic.run(cut_jobs.train_adapters, args=[str(tmp_path / "b")], workers=2, stages=2).value
    assert alone[:2] == spread[:2]
    assert spread[2].count("]") == 2
    assert len(alone[1]) == 4  # both matrices of both blocks
    assert all("lora_" in name for name in alone[1])
    index = json.loads((tmp_path / "b" / "step-00000002" / "model.safetensors.index.json").read_text())
    assert set(alone[1]) < set(index["weight_map"])
