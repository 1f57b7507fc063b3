"""Checks that a checkpoint can hold a model and its optimizer: when the Trainer is made, not at the first save."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from elastic.checkpoint.files import CODES
from elastic.checkpoint.plan import plan_files
from elastic.checkpoint.state import PARAM, Contents, Spec
from elastic.engine.model import LayeredModel
from elastic.errors import CheckpointError, TrainerError
from elastic.layout.regions import ModelSpec
from elastic.worker.restore import form, is_whole, persistent_buffers


def check_savable(model: LayeredModel, states: Mapping[str, Any], worker: int) -> None:
    """Checks all tensors and states. `states` has by name an example of each optimizer state without its parameter's shape.

    Raises:
        TrainerError: naming a tensor or state that no checkpoint can hold, and the remedy.
    """
    for name, value in states.items():
        tensor = isinstance(value, torch.Tensor)
        if not (isinstance(value, bool | int | float) or (tensor and (value.numel() == 1 or is_whole(value, model.spec.cut)))):
            raise TrainerError(
                f"the optimizer keeps a {type(value).__name__} as its state {name!r}, which cannot be in a checkpoint; numbers and tensors "
                "can. Use another optimizer, or leave out checkpoint="
            )
    rest = {**{name: model.parameter(name) for name in model.frozen}, **dict(persistent_buffers(model.root))}
    for name, tensor in rest.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in CODES or tensor.layout != torch.strided or tensor.is_quantized:
            kind = dtype if tensor.layout == torch.strided else str(tensor.layout).removeprefix("torch.")
            raise TrainerError(
                f"{name} is {kind}, which cannot be in a checkpoint: keep it in another dtype ({', '.join(CODES)}), or, if it can be "
                "computed again, register it with persistent=False"
            )
    if worker == 0:
        forms = {p.name: (p.shape, p.dtype) for layer in model.spec.layers for p in layer.parameters}
        forms |= {name: form(tensor) for name, tensor in rest.items()}
        try:
            plan_files(Contents(tensors={name: {PARAM: Spec(shape=shape, dtype=dtype)} for name, (shape, dtype) in forms.items()}))
        except CheckpointError as error:
            raise TrainerError(f"the model cannot be in a checkpoint: {error}") from error


def empty_states(spec: ModelSpec) -> dict[str, dict[str, str]]:
    """Returns the states of parameters without elements, which no worker owns."""
    return {p.name: {PARAM: p.dtype} for layer in spec.layers for p in layer.parameters if not p.size}
