"""Values that may cross a layer boundary: a tensor, or tuples, lists and string-keyed dicts of tensors and None.

Subclasses of dict and tuples with named fields keep their class.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from elastic.engine.structure import Named, found_class, named_fields
from elastic.errors import TrainerError
from elastic.memory.raw import ALIGNMENT_BYTES, padding
from elastic.memory.staging import Part
from elastic.memory.tensors import contiguous, of_bytes


class _TensorLeaf:
    """Marks the place of the next tensor in a structure."""


LEAF = _TensorLeaf()


def flatten(value: Any, where: str) -> tuple[Any, list[torch.Tensor]]:
    """Returns the structure of a value, with `LEAF` in place of tensors, and its tensors in order.

    Raises:
        TrainerError: naming `where` and the type that cannot cross.
    """
    if isinstance(value, torch.Tensor):
        return LEAF, [value]
    if value is None:
        return None, []
    fields = named_fields(value)
    if fields is not None:
        structure, tensors = flatten(fields, where)
        return Named(type(value), structure), tensors
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        parts = {name: flatten(item, where) for name, item in value.items()}
        return {name: part[0] for name, part in parts.items()}, [tensor for part in parts.values() for tensor in part[1]]
    if type(value) in (tuple, list):
        parts = [flatten(item, where) for item in value]
        return type(value)(part[0] for part in parts), [tensor for part in parts for tensor in part[1]]
    raise TrainerError(
        f"{where} gave a {type(value).__name__}, which cannot cross a layer boundary: give a tensor, or a tuple, list or dict of tensors "
        "(None inside is fine). Else join the layer with the one that follows it; or, if it is the model's last, let it return only what "
        "the loss needs (a model of transformers: use_cache=False)"
    )


def unflatten(structure: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """Rebuilds a value; the inverse of `flatten`."""
    remaining = iter(tensors)

    def build(part: Any) -> Any:
        if part is LEAF:
            return next(remaining)
        if isinstance(part, Named):
            return part.build(build(part.fields))
        if isinstance(part, dict):
            return {name: build(item) for name, item in part.items()}
        if isinstance(part, tuple | list):
            return type(part)(build(item) for item in part)
        return part

    return build(structure)


def _structure_to_json(part: Any) -> Any:
    if part is LEAF:
        return 0
    if isinstance(part, Named):
        return {"c": part.path, "f": _structure_to_json(part.fields)}
    if isinstance(part, dict):
        return {"d": {name: _structure_to_json(item) for name, item in part.items()}}
    if isinstance(part, tuple | list):
        return {"t" if isinstance(part, tuple) else "l": [_structure_to_json(item) for item in part]}
    return part


def _structure_from_json(part: Any) -> Any:
    if part == 0:
        return LEAF
    if part is None:
        return None
    if "c" in part:
        return Named(found_class(part["c"]), _structure_from_json(part["f"]))
    if "d" in part:
        return {name: _structure_from_json(item) for name, item in part["d"].items()}
    return (tuple if "t" in part else list)(_structure_from_json(item) for item in part["t" if "t" in part else "l"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """A value that crosses a boundary: detached tensors, and for each whether a gradient is sent back."""

    structure: Any
    tensors: tuple[torch.Tensor | None, ...]
    differentiable: tuple[bool, ...]


_ZEROS = bytes(ALIGNMENT_BYTES)


def encode(crossing: Crossing) -> list[Part]:
    """Returns the parts of one message: a JSON header, then every tensor's raw memory, each padded to 64 bytes."""
    header = json.dumps(
        {
            "structure": _structure_to_json(crossing.structure),
            "tensors": [None if t is None else [str(t.dtype).removeprefix("torch."), list(t.shape)] for t in crossing.tensors],
            "differentiable": [int(flag) for flag in crossing.differentiable],
        },
        separators=(",", ":"),
    ).encode()
    head = len(header).to_bytes(4, "little") + header
    parts: list[Part] = [head + _ZEROS[: padding(len(head))]]
    for tensor in crossing.tensors:
        if tensor is not None and tensor.numel():
            parts.append(contiguous(tensor))
            if missing := padding(tensor.nbytes):
                parts.append(_ZEROS[:missing])
    return parts


def decode(message: np.ndarray) -> Crossing:
    """Reads a message; the inverse of `encode`. The tensors share the message's memory."""
    size = int.from_bytes(message[:4].tobytes(), "little")
    header = json.loads(message[4 : 4 + size].tobytes())
    offset = 4 + size + padding(4 + size)
    tensors: list[torch.Tensor | None] = []
    for form in header["tensors"]:
        if form is None:
            tensors.append(None)
            continue
        dtype, shape = getattr(torch, form[0]), form[1]
        length = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        tensors.append(of_bytes(message[offset : offset + length], dtype, shape))
        offset += length + padding(length)
    return Crossing(
        structure=_structure_from_json(header["structure"]),
        tensors=tuple(tensors),
        differentiable=tuple(bool(flag) for flag in header["differentiable"]),
    )
