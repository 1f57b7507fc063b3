"""Runs the example that fine-tunes a Llama as a user does: a tiny one, over three stages."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.usefixtures("leftovers"),
    pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed, which makes the model"),
]


def _llama(*options: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / "llama.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _reference(weights: Path) -> tuple[float, dict[str, Any]]:
    """Returns the first step's loss as transformers computes it with the directory's weights in float32, and the weights."""
    import transformers  # pyright: ignore[reportMissingImports]

    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import llama  # pyright: ignore[reportMissingImports]
    finally:
        sys.path.remove(str(ROOT / "examples"))
    model = transformers.LlamaForCausalLM.from_pretrained(weights, dtype=torch.float32, attn_implementation="sdpa")
    text, losses = Path(llama.__file__).read_bytes().decode("latin-1").encode("latin-1"), []
    for micro_batch in range(8):
        batch = llama.batch(0, micro_batch, text, 2, 64)
        losses.append(float(llama.cross_entropy(model(batch[0]), batch).detach()))
    return sum(losses) / 8, model.state_dict()


def test_a_llama_is_fine_tuned_from_a_directory_of_which_each_worker_reads_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # importing transformers makes a directory
    import transformers  # pyright: ignore[reportMissingImports]

    import examples.llama as example  # pyright: ignore[reportMissingImports]

    weights, output = tmp_path / "tiny", tmp_path / "tuned"
    example.make_tiny(weights)
    told = _llama("--steps", "4", "--weights", str(weights), "--output", str(output))
    expected, before = _reference(weights)
    losses = re.search(r"loss (\S+) -> (\S+)", told)
    assert losses is not None
    assert float(losses[1]) == pytest.approx(expected, abs=1e-4)
    assert float(losses[2]) < float(losses[1])
    read = [int(each.replace(",", "")) for each in re.findall(r"read ([\d,]+) bytes of", told)]
    stored = sum(2 * each.numel() for each in before.values())
    assert len(read) == 3
    assert stored <= sum(read) <= stored + 3 * 64 * len(before)
    assert max(read) < 0.5 * stored
    alone = _llama("--steps", "4", "--weights", str(weights), "--workers", "1", "--stages", "1")
    assert re.findall(r"digest \w+", alone) == re.findall(r"digest \w+", told)
    (saved,) = output.glob("step-*")
    tuned = transformers.LlamaForCausalLM.from_pretrained(saved).state_dict()
    assert tuned.keys() == before.keys()
    assert not any(torch.equal(tuned[name], before[name]) for name in before)
