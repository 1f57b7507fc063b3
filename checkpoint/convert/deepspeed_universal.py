"""Reads DeepSpeed Universal: `zero/<name>/{fp32,exp_avg,...,step}.pt`, `zero/optimizer_state.pt` and the unchanged model files.

From DeepSpeed 0.19.8, `checkpoint/ds_to_universal.py` (the files) and `checkpoint/universal_checkpoint.py`
(`load_hp_checkpoint_state`). A state's file holds `{"param": tensor}`, from ZeRO-3 a flat tensor. ZeRO-3 writes no `step.pt`: the step is
in `optimizer_state.pt`, whose groups list the numbers of the (sub-)groups in `param_shapes` of the model files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from elastic.checkpoint.convert.deepspeed_models import Models, Opening, read_models
from elastic.checkpoint.convert.deepspeed_pieces import PiecedTensor, PieceSource, specs
from elastic.checkpoint.convert.optimizer import settings_of
from elastic.checkpoint.pickles import number
from elastic.checkpoint.state import PARAM, Contents, Group
from elastic.checkpoint.stored import is_tensor
from elastic.errors import CheckpointError

UniversalScalars = dict[str, dict[str, float | int | bool]]


def read_universal(opening: Opening) -> PieceSource:
    """Opens the directory of a Universal checkpoint. Raises CheckpointError with file and reason."""
    models = read_models(opening)
    optimizer = opening.load(opening.folder / "zero" / "optimizer_state.pt")
    groups = _groups(models, optimizer, opening.drops)
    found: dict[str, dict[str, PiecedTensor]] = {name: {PARAM: pieces} for name, pieces in models.fixed.items()}
    scalars: UniversalScalars = {}
    for shapes in models.shapes.values():
        for flat, names in enumerate(shapes):
            for name, shape in names.items():
                if opening.drops(name):
                    continue
                found[name], scalars[name] = _parameter(opening, name, shape)
                scalars[name] = {**_shared(optimizer, flat), **scalars[name]}
    contents = Contents(
        tensors=specs(found),
        scalars={name: numbers for name, numbers in scalars.items() if numbers},
        groups=groups,
        ties=models.ties,
        frozen=models.frozen,
        buffers=models.buffers,
        step=models.step,
        extra=models.extra,
    )
    return PieceSource("deepspeed-universal", contents, found, opening.files)


def _parameter(opening: Opening, name: str, shape: Sequence[int]) -> tuple[dict[str, PiecedTensor], dict[str, float | int | bool]]:
    """Returns one parameter's tensors and numbers."""
    folder = opening.folder / "zero" / name
    tensors: dict[str, PiecedTensor] = {}
    numbers: dict[str, float | int | bool] = {}
    for path in sorted(folder.glob("*.pt")):
        value = opening.load(path)
        wrapped = isinstance(value, dict)  # true for a tensor, false for a number
        value = value.get("param") if wrapped else value
        if not wrapped and (scalar := number(value)) is not None and path.stem != "fp32":
            numbers[path.stem] = scalar
        elif value is not None and is_tensor(value):
            tensors[PARAM if path.stem == "fp32" else path.stem] = PiecedTensor.whole(str(path), value, shape)
        else:
            raise CheckpointError(f"{path}: it holds neither a tensor under 'param' nor a number")
    if PARAM not in tensors:
        raise CheckpointError(f"{folder / 'fp32.pt'}: the parameter's values are missing")
    return tensors, numbers


def _shared(optimizer: Mapping[str, Any], flat: int) -> dict[str, float | int | bool]:
    """Returns the numbers of a (sub-)group that a ZeRO-3 checkpoint keeps in the common file."""
    states = (optimizer.get("optimizer_state_dict") or {}).get("state", {})
    found = {key: number(value) for key, value in states.get(flat, {}).items()}
    return {key: value for key, value in found.items() if value is not None}


def _groups(models: Models, optimizer: Mapping[str, Any], drops: Callable[[str], bool]) -> tuple[Group, ...]:
    listed = optimizer.get("param_groups") or []
    groups: list[Group] = []
    for settings in listed:
        names = [name for shapes in models.shapes.values() for flat in settings["params"] for name in shapes[flat] if not drops(name)]
        groups.append(Group(names=tuple(dict.fromkeys(names)), settings=settings_of(settings, f"group {len(groups)}")))
    return tuple(groups)
