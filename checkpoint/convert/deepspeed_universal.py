"""DeepSpeed Universal, read: `zero/<name>/{fp32,exp_avg,...,step}.pt`, `zero/optimizer_state.pt` and the model files as they were.

Read from DeepSpeed 0.19.8, `checkpoint/ds_to_universal.py` (the files) and `checkpoint/universal_checkpoint.py`
(`load_hp_checkpoint_state`). A state's file holds `{"param": tensor}`, from ZeRO-3 a flat tensor. ZeRO-3 leaves out `step.pt`: it is in
`optimizer_state.pt`, which has the groups with the numbers of the (sub-)groups that `param_shapes` of the model files name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoint.convert.deepspeed_models import Models, read_models
from checkpoint.convert.deepspeed_pieces import Piece, Pieces, PieceSource, specs
from checkpoint.pickles import load, number, plain
from checkpoint.state import PARAM, Contents, Group
from elastic.errors import CheckpointError

Scalars = dict[str, dict[str, float | int | bool]]


def read_universal(folder: Path, *, trusted: bool = False) -> PieceSource:
    """The source of a Universal checkpoint's directory. Raises CheckpointError naming file and reason."""
    models = read_models(folder, trusted=trusted)
    optimizer = load(folder / "zero" / "optimizer_state.pt", trusted=trusted)
    groups = _groups(models, optimizer)
    found: dict[str, dict[str, Pieces]] = {name: {PARAM: pieces} for name, pieces in models.fixed.items()}
    scalars: Scalars = {}
    for shapes in models.shapes.values():
        for flat, names in enumerate(shapes):
            for name, shape in names.items():
                found[name], scalars[name] = _parameter(folder / "zero" / name, shape, trusted)
                scalars[name] = {**_shared(optimizer, flat), **scalars[name]}
    contents = Contents(
        tensors=specs(found),
        scalars={name: numbers for name, numbers in scalars.items() if numbers},
        groups=groups,
        ties=models.ties,
        frozen=models.frozen,
        buffers=models.buffers,
        step=models.step,
        extra={"deepspeed": models.extra},
    )
    return PieceSource("deepspeed-universal", contents, found)


def _parameter(folder: Path, shape: Sequence[int], trusted: bool) -> tuple[dict[str, Pieces], dict[str, float | int | bool]]:
    """One parameter's tensors and numbers."""
    tensors: dict[str, Pieces] = {}
    numbers: dict[str, float | int | bool] = {}
    for path in sorted(folder.glob("*.pt")):
        value = load(path, trusted=trusted)
        value = value.get("param") if isinstance(value, dict) else value
        if (told := number(value)) is not None and path.stem != "fp32":
            numbers[path.stem] = told
        elif value is not None and hasattr(value, "read"):
            piece = Piece(start=0, stop=math.prod(value.shape), held=value, at=0)
            state = PARAM if path.stem == "fp32" else path.stem
            tensors[state] = Pieces(what=str(path), shape=tuple(shape), dtype=value.dtype, pieces=(piece,) if piece.stop else ())
        else:
            raise CheckpointError(f"{path}: it holds neither a tensor under 'param' nor a number")
    if PARAM not in tensors:
        raise CheckpointError(f"{folder / 'fp32.pt'}: the parameter's values are missing")
    return tensors, numbers


def _shared(optimizer: Mapping[str, Any], flat: int) -> dict[str, float | int | bool]:
    """Numbers of a (sub-)group that a ZeRO-3 checkpoint keeps in the common file."""
    states = (optimizer.get("optimizer_state_dict") or {}).get("state", {})
    found = {key: number(value) for key, value in states.get(flat, {}).items()}
    return {key: value for key, value in found.items() if value is not None}


def _groups(models: Models, optimizer: Mapping[str, Any]) -> tuple[Group, ...]:
    listed = optimizer.get("param_groups") or []
    groups: list[Group] = []
    for settings in listed:
        names = [name for shapes in models.shapes.values() for flat in settings["params"] for name in shapes[flat]]
        told = {key: plain(value) for key, value in settings.items() if key != "params"}
        groups.append(Group(names=tuple(dict.fromkeys(names)), settings=told))
    return tuple(groups)
