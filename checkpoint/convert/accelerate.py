"""Reads directories of Accelerate's `save_state`, and of Hugging Face's Trainer with FSDP's sharded state.

From accelerate 1.15 (`checkpointing.py`, `utils/fsdp_utils.py`). On one process, or several with equal state: `model.safetensors` or
`pytorch_model.bin`, `optimizer.bin`, `scheduler.bin`, `random_states_*.pkl`. With FSDP and sharded state dicts: a distributed checkpoint of
torch in `pytorch_model_fsdp_0`, and one in `optimizer_0`. The states of random generators, samplers and custom objects are not read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from elastic.checkpoint.convert.dcp import METADATA, read_tree
from elastic.checkpoint.convert.hf import read_configs
from elastic.checkpoint.convert.hf import recognise as recognise_weights
from elastic.checkpoint.convert.hf_weights import load_weights
from elastic.checkpoint.convert.nested import Nested, interpret
from elastic.checkpoint.convert.rules import Rules
from elastic.checkpoint.convert.trainer import STATE, read_optimizers, read_state
from elastic.checkpoint.convert.tree import TreeParts
from elastic.checkpoint.stored import Files
from elastic.errors import CheckpointError

SHARDED, SHARDED_OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"
_OTHERS = ("random_states_*.pkl", "sampler*.bin", "dl_state_dict*.bin", "custom_checkpoint_*.pkl")

Checks = list[Callable[[], str]]


def recognise(path: Path) -> str | None:
    """Returns why a path is such a directory; None if it is not."""
    if not path.is_dir():
        return None
    if (path / SHARDED / METADATA).is_file():
        return f"it has a directory {SHARDED}"
    marks = [*path.glob("random_states_*.pkl"), *path.glob("optimizer.bin")]
    if marks and not (path / STATE).is_file() and recognise_weights(path):
        return f"it has weights and a file {marks[0].name}"
    return None


def _refuse_several(path: Path) -> None:
    patterns = ("model_[1-9]*.safetensors", "pytorch_model_[1-9]*.bin", "optimizer_[1-9]*", "pytorch_model_fsdp_[1-9]*")
    more = sorted(file.name for pattern in patterns for file in path.glob(pattern))
    if more:
        raise CheckpointError(f"{path} holds several models or optimizers ({', '.join(more)}); only directories with one are read")


def _sharded(path: Path, files: Files, trust: bool, rules: Rules) -> tuple[dict[str, Any], Checks]:
    tree, pieces = read_tree(path / SHARDED, files, trust=trust, rules=rules)
    checks: Checks = [pieces.verify]
    if (path / SHARDED_OPTIMIZER / METADATA).is_file():
        states, more = read_tree(path / SHARDED_OPTIMIZER, files, trust=trust, rules=rules)
        tree, checks = {**states, **tree}, [*checks, more.verify]
    return tree, checks


def open_accelerate(path: Path, *, trust_pickle: bool = False, rules: Rules | None = None) -> Nested:
    """Opens a directory. Raises CheckpointError; an optimizer next to safetensors needs a rule that names its parameters."""
    files, rules = Files(), rules or Rules()
    try:
        _refuse_several(path)
        sharded = (path / SHARDED / METADATA).is_file()
        weights = None if sharded else load_weights(path, files, trust=trust_pickle, rules=rules)
        tree, checks = (weights.tree, [weights.check]) if weights else _sharded(path, files, trust_pickle, rules)
        optimizers, check = read_optimizers(path, files, trust=trust_pickle)
        tree |= {**optimizers, **read_configs(path, files), **read_state(path, files)}
        if weights:
            rules = replace(rules, order=replace(rules.order, by_definition=weights.ordered))
        optimizer = ("optimizer",) if "optimizer" in tree else None
        contents, tensors = interpret(tree, rules=rules, found=TreeParts(model=("model",), optimizer=optimizer))
    except CheckpointError:
        files.close()
        raise
    if weights:
        contents = replace(contents, unread=(*weights.unread, *contents.unread))
    skipped = sorted(file.name for pattern in _OTHERS for file in path.glob(pattern))
    if skipped:
        contents = replace(contents, extra={**contents.extra, "not_read": skipped})
    parts = [*checks, check]
    return Nested(format="accelerate", contents=contents, tensors=tensors, files=files, check=lambda: "; ".join(one() for one in parts))
