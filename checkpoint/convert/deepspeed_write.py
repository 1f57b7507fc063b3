"""Writes DeepSpeed Universal from any source, tensor by tensor.

DeepSpeed 0.19.8 reads back: in stages 1 and 2, every `zero/<name>/*.pt` and, by position, the settings of `param_groups` in
`zero/optimizer_state.pt` (`runtime/base_optimizer.py`); in stage 3, `fp32`, `exp_avg`, `exp_avg_sq`, and the step and the settings of
group 0 for all groups (a limit of `runtime/zero/stage3.py`). Both model files are written, because each stage opens its own name.
DeepSpeed itself restores neither frozen parameters nor buffers from Universal; they are in `module` for readers that do.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from elastic.checkpoint.convert.deepspeed_models import OURS
from elastic.checkpoint.convert.nested import Leaf
from elastic.checkpoint.convert.optimizer import scalar_tensor, setting
from elastic.checkpoint.convert.output import ConversionProgress, Reading, put, replace_text, run_bytes, silent
from elastic.checkpoint.pickles.write import Streamed, save
from elastic.checkpoint.state import PARAM, Source
from elastic.errors import CheckpointError

_VERSION = "0.19.8"
LATEST = "latest_universal"


def write(source: Source, path: str | os.PathLike[str], *, max_memory: int, progress: ConversionProgress = silent) -> None:
    """Writes a Universal checkpoint into the new directory `path`, and its name into `latest_universal` next to it.

    `max_memory` in bytes. Raises CheckpointError with what cannot be written; then `path` does not exist.
    """
    path = Path(path)
    _check(source, path)
    # a run is in memory twice: in pieces, and gathered
    reading = Reading(source=source, limit=run_bytes(max_memory // 2), progress=progress)
    with put(path, directory=True) as place:
        _write_parameters(reading, place / "zero")
        save(_optimizer(source), place / "zero" / "optimizer_state.pt")
        for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
            save(_model(reading), place / name)
    replace_text(path.parent / LATEST, path.name)


def _check(source: Source, path: Path) -> None:
    contents = source.contents
    grouped = [name for group in contents.groups for name in group.names]
    missing = set(grouped) - set(contents.tensors)
    alone = set(contents.tensors) - set(grouped) - contents.frozen - contents.buffers
    if missing or (alone and grouped):
        raise CheckpointError(f"{path}: parameters in no group, or groups without values: {sorted(missing | alone)[:5]}")
    for name, states in contents.tensors.items():
        if "/" in name or name in ("", ".", ".."):
            raise CheckpointError(f"{path}: {name!r} cannot be the name of a directory")
        for state, spec in states.items():
            if "/" in state:
                raise CheckpointError(f"{path}: the state {state} of {name} cannot be the name of a file")
            if name in grouped and spec.shape != states[PARAM].shape:
                raise CheckpointError(f"{path}: {state} of {name} has shape {spec.shape}, not its parameter's {states[PARAM].shape}")


def _trained(source: Source) -> list[list[str]]:
    """Returns names by group; all in one if the source has no groups."""
    contents = source.contents
    if contents.groups:
        return [list(group.names) for group in contents.groups]
    return [[name for name in contents.tensors if name not in contents.frozen | contents.buffers]]


def _streamed(reading: Reading, name: str, state: str) -> Streamed:
    leaf = Leaf(name, state, reading.source.contents.tensors[name][state])
    return Streamed(spec=leaf.spec, chunks=lambda: reading.runs(leaf))


def _number(value: float | int | bool) -> Any:
    """Returns a float as a tensor, as torch's own optimizers keep a step; other numbers (DeepSpeed's steps) stay."""
    if not isinstance(value, float):
        return value
    return scalar_tensor(value)


def _write_parameters(reading: Reading, folder: Path) -> None:
    source = reading.source
    for name in (name for names in _trained(source) for name in names):
        (folder / name).mkdir(parents=True)
        for state in source.contents.tensors[name]:
            save({"param": _streamed(reading, name, state)}, folder / name / f"{'fp32' if state == PARAM else state}.pt")
        for key, scalar in source.contents.scalars.get(name, {}).items():
            save(_number(scalar), folder / name / f"{key}.pt")


def _optimizer(source: Source) -> dict[str, Any]:
    """Returns `optimizer_state.pt` for the loaders of all stages."""
    groups = [
        {**{key: setting(key, value) for key, value in group.settings.items()}, "params": [index]}
        for index, group in enumerate(source.contents.groups)
    ]
    firsts = [names[0] if names else "" for names in _trained(source)]
    states = {
        index: {key: _number(scalar) for key, scalar in source.contents.scalars.get(name, {}).items()} for index, name in enumerate(firsts)
    }
    kept = source.contents.extra.get("deepspeed", {})
    found: dict[str, Any] = {"ds_version": _VERSION, "zero_stage": 1, "param_groups": groups}
    found["optimizer_state_dict"] = {"state": states, "param_groups": groups}
    return found | {key: kept[key] for key in ("clip_grad",) if key in kept}


def _model(reading: Reading) -> dict[str, Any]:
    contents, source = reading.source.contents, reading.source
    kept = {key: value for key, value in contents.extra.get("deepspeed", {}).items() if key not in ("zero_stage", "not_read")}
    fixed = [name for name in contents.tensors if name in contents.frozen | contents.buffers]
    shapes = [OrderedDict((name, torch.Size(contents.tensors[name][PARAM].shape)) for name in names) for names in _trained(source)]
    own = {
        "module": OrderedDict((name, _streamed(reading, name, PARAM)) for name in fixed),
        "buffer_names": sorted(contents.buffers),
        "param_shapes": shapes,
        "shared_params": dict(contents.ties),
        "global_steps": contents.step or 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": _VERSION,
    }
    defaults = {"optimizer": None, "lr_scheduler": None, "skipped_steps": 0, "ds_config": {}}
    parallel = {"checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1}}
    rest = {key: value for key, value in contents.extra.items() if key != "deepspeed"}
    ours = {OURS: json.dumps({"extra": rest, "deepspeed": "deepspeed" in contents.extra})} if rest else {}
    return {**defaults, **kept, **own, **ours, **parallel, "universal_checkpoint_info": {"universal_checkpoint_version": 0.4}}
