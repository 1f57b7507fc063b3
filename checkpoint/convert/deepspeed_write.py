"""DeepSpeed Universal, written from any source, tensor by tensor.

What DeepSpeed 0.19.8 reads back: stages 1 and 2 take every `zero/<name>/*.pt` and, by position, the settings of `param_groups` in
`zero/optimizer_state.pt` (`runtime/base_optimizer.py`); stage 3 takes `fp32`, `exp_avg`, `exp_avg_sq`, the step of group 0 and the settings
of group 0 for all groups (`runtime/zero/stage3.py`: its own limit). Both model files are written, since each stage opens its own name.
DeepSpeed itself restores neither frozen parameters nor buffers from Universal; they are in `module` for readers that do.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from checkpoint.pickles.write import STORABLE, Streamed, save
from checkpoint.state import PARAM, Source
from elastic.errors import CheckpointError

_VERSION = "0.19.8"


def write(source: Source, path: str | os.PathLike[str], *, max_memory: int) -> None:
    """A Universal checkpoint in the new directory `path`, named by `latest_universal` beside it.

    Holds at most `max_memory` bytes of tensors.

    Raises CheckpointError naming what cannot be written; then `path` does not exist.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    if path.exists() or partial.exists():
        raise CheckpointError(f"{path}: it exists, and is not written over")
    _check(source, path)
    try:
        _write_parameters(source, partial / "zero", max_memory)
        save(_optimizer(source), partial / "zero" / "optimizer_state.pt")
        for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
            save(_model(source, max_memory), partial / name)
        partial.rename(path)
        (path.parent / "latest_universal").write_text(path.name)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not written ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
            if getattr(torch, spec.dtype, None) not in STORABLE or "/" in state:
                raise CheckpointError(f"{path}: {state} of {name} with dtype {spec.dtype} cannot be written")
            if name in grouped and spec.shape != states[PARAM].shape:
                raise CheckpointError(f"{path}: {state} of {name} has shape {spec.shape}, not its parameter's {states[PARAM].shape}")


def _trained(source: Source) -> list[list[str]]:
    """Names by group; all in one where the source has no groups."""
    contents = source.contents
    if contents.groups:
        return [list(group.names) for group in contents.groups]
    return [[name for name in contents.tensors if name not in contents.frozen | contents.buffers]]


def _streamed(source: Source, name: str, state: str, max_memory: int, dtype: torch.dtype | None = None) -> Streamed:
    spec = source.contents.tensors[name][state]
    kind: torch.dtype = dtype or getattr(torch, spec.dtype)
    # A chunk is held as read, and again as converted or gathered from pieces.
    step = max(1, max_memory // (4 * 8))

    def chunks() -> Iterator[torch.Tensor]:
        size = math.prod(spec.shape)
        for start in range(0, size, step):
            yield source.read(name, state, start, min(size, start + step)).to(kind)

    return Streamed(shape=spec.shape, dtype=kind, chunks=chunks)


def _number(value: float | int | bool) -> Any:
    """Torch's own optimizers keep a step as a float tensor, DeepSpeed's as a number."""
    if not isinstance(value, float):
        return value
    return Streamed(shape=(), dtype=torch.float32, chunks=lambda: iter([torch.tensor([value])]))


def _write_parameters(source: Source, folder: Path, max_memory: int) -> None:
    for name in (name for names in _trained(source) for name in names):
        (folder / name).mkdir(parents=True)
        for state in source.contents.tensors[name]:
            master = torch.float32 if state == PARAM else None
            value = {"param": _streamed(source, name, state, max_memory, master)}
            save(value, folder / name / f"{'fp32' if state == PARAM else state}.pt")
        for key, told in source.contents.scalars.get(name, {}).items():
            save(_number(told), folder / name / f"{key}.pt")


def _settings(settings: Any) -> dict[str, Any]:
    return {key: tuple(value) if key == "betas" else value for key, value in settings.items()}


def _optimizer(source: Source) -> dict[str, Any]:
    """What both loaders take from `optimizer_state.pt`."""
    groups = [{**_settings(group.settings), "params": [index]} for index, group in enumerate(source.contents.groups)]
    firsts = [names[0] if names else "" for names in _trained(source)]
    states = {
        index: {key: _number(told) for key, told in source.contents.scalars.get(name, {}).items()} for index, name in enumerate(firsts)
    }
    kept = source.contents.extra.get("deepspeed", {})
    found: dict[str, Any] = {"ds_version": _VERSION, "zero_stage": 1, "param_groups": groups}
    found["optimizer_state_dict"] = {"state": states, "param_groups": groups}
    return found | {key: kept[key] for key in ("clip_grad",) if key in kept}


def _model(source: Source, max_memory: int) -> dict[str, Any]:
    contents = source.contents
    kept = {key: value for key, value in contents.extra.get("deepspeed", {}).items() if key not in ("zero_stage", "not_read")}
    fixed = [name for name in contents.tensors if name in contents.frozen | contents.buffers]
    shapes = [OrderedDict((name, torch.Size(contents.tensors[name][PARAM].shape)) for name in names) for names in _trained(source)]
    own = {
        "module": OrderedDict((name, _streamed(source, name, PARAM, max_memory)) for name in fixed),
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
    return {**defaults, **kept, **own, **parallel, "universal_checkpoint_info": {"universal_checkpoint_version": 0.4}}
