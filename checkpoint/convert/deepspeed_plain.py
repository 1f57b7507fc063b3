"""Reads DeepSpeed without ZeRO (stage 0): model and the optimizer's own state dict, both whole, in `mp_rank_00_model_states.pt`.

From DeepSpeed 0.19.8, `runtime/engine.py`, `_save_checkpoint`: without ZeRO `optimizer` is the optimizer's `state_dict()`: in fp32 that of
torch's optimizer, in fp16 that of a wrapper with flat vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from elastic.checkpoint.convert.deepspeed_models import Opening, extra_of, model_files, refuse_tensor_parallel
from elastic.checkpoint.convert.nested import Nested, interpret
from elastic.checkpoint.convert.rules import Rules
from elastic.checkpoint.convert.tree import TreeParts
from elastic.checkpoint.pickles import Archive, load_archive
from elastic.checkpoint.state import PARAM
from elastic.checkpoint.stored import is_tensor
from elastic.errors import CheckpointError


def read_plain(opening: Opening, rules: Rules) -> Nested:
    """Opens a directory without ZeRO. Raises CheckpointError with file and reason."""
    found = model_files(opening.folder)
    path = found[0, 0]
    archive = Archive(path, files=opening.files)
    state = load_archive(archive, trusted=opening.trusted)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} was not saved by DeepSpeed's engine")
    if state.get("param_shapes") is not None:
        raise CheckpointError(f"{opening.folder}: it was saved with ZeRO, and the shards of its optimizer (*_optim_states.pt) are missing")
    refuse_tensor_parallel(opening.folder, state, {mp for _, mp in found})
    module = state.get("module")
    if not isinstance(module, Mapping):
        raise CheckpointError(f"{path} holds no module; a pipeline without ZeRO is not read")
    optimizer = state.get("optimizer")
    if isinstance(optimizer, Mapping) and "param_groups" not in optimizer and not rules.drops("optimizer"):
        raise CheckpointError(
            f"{path}: its optimizer is DeepSpeed's wrapper for fp16, whose flat vectors are not read: leave it out by the rule "
            "drop = ['optimizer']"
        )
    known = set(state.get("buffer_names") or ())
    buffers = {name: value for name, value in module.items() if name in known and is_tensor(value) and not rules.drops(name)}
    tree: dict[str, Any] = {"module": {name: value for name, value in module.items() if name not in buffers}, "optimizer": optimizer}
    where = TreeParts(model=("module",), optimizer=("optimizer",) if isinstance(optimizer, Mapping) else None)
    contents, tensors = interpret({key: value for key, value in tree.items() if value is not None}, rules=rules, found=where)
    step = state.get("global_steps")
    contents = replace(
        contents,
        tensors={**contents.tensors, **{name: {PARAM: value.spec} for name, value in buffers.items()}},
        buffers=contents.buffers | set(buffers),
        step=step if type(step) is int else None,
        extra={**contents.extra, **extra_of(state)},
    )
    tensors |= {(name, PARAM): value for name, value in buffers.items()}

    def check() -> str:
        checked, bare = archive.verify()
        return f"CRC-32 of {checked} bytes agree; {bare} bytes have no checksum"

    return Nested(format="deepspeed", contents=contents, tensors=tensors, files=opening.files, check=check)
