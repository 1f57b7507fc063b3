"""Converts values to JSON and back without loss. A value that JSON lacks becomes an object with one key, such as `$tuple`."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from elastic.checkpoint.dtypes import dtype_of, name_of
from elastic.checkpoint.pickles import Global, Opaque
from elastic.checkpoint.stored import ReadableTensor, is_tensor
from elastic.errors import CheckpointError

TENSOR_LIMIT = 1 << 20
"""Most elements of a tensor among the extra values."""


@dataclass(frozen=True, slots=True)
class Unread:
    """A placeholder for a value that could not be read, with the reason."""

    reason: str


def _bytes_of(flat: torch.Tensor) -> bytes:
    return flat.contiguous().view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _tensor(value: ReadableTensor, where: str) -> Any:
    count = value.spec.elements
    if count > TENSOR_LIMIT:
        top, _, below = where.partition(".")
        new = r"regex = '{}\.(.*)' to = 'NAME.\1'" if below else "exact = '{}' to = 'NAME'"
        raise CheckpointError(
            f"{where} is a {value.spec.dtype} tensor of shape {list(value.spec.shape)} outside model and optimizer. Drop it by a rule, "
            f"drop = ['{re.escape(top)}'], or move it into the model by another name: [[rename]] {new.format(re.escape(top))}"
        )
    data = base64.b64encode(_bytes_of(value.run(0, count))).decode()
    return {"$tensor": {"dtype": value.spec.dtype, "shape": list(value.spec.shape), "data": data}}


def encode(value: Any, where: str) -> Any:
    """Encodes a value as JSON; `where` names it in errors. Raises CheckpointError for a value that cannot be encoded."""
    match value:
        case None | bool() | int() | str() if type(value) in (type(None), bool, int, str):
            return value
        case float() if type(value) is float:
            return value
        case bytes():
            return {"$bytes": base64.b64encode(value).decode()}
        case complex():
            return {"$complex": [encode(value.real, where), encode(value.imag, where)]}
        case torch.dtype():
            return {"$dtype": name_of(value)}
        case list():
            return [encode(item, f"{where}.{index}") for index, item in enumerate(value)]
        case tuple():
            return {"$tuple": [encode(item, f"{where}.{index}") for index, item in enumerate(value)]}
        case set() | frozenset():
            return {"$set": [encode(item, where) for item in sorted(value, key=repr)]}
        case dict():
            if all(type(key) is str and not key.startswith("$") for key in value):
                return {key: encode(item, f"{where}.{key}") for key, item in value.items()}
            return {"$dict": [[encode(key, where), encode(item, f"{where}.{key}")] for key, item in value.items()]}
    if is_tensor(value):
        return _tensor(value, where)
    if isinstance(value, Unread):
        raise CheckpointError(value.reason)
    rule = f"drop it by a rule, drop = ['{re.escape(where)}']"
    if isinstance(value, Opaque | Global):
        name = value.cls if isinstance(value, Opaque) else value
        raise CheckpointError(
            f"{where} is a {name}, which is not on the list of harmless names: {rule}; or, if you trust the file's author and the object "
            "consists of plain values, pass --trust-pickle"
        )
    raise CheckpointError(f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which can only be stored as a pickle; {rule}")


def encoded(values: Mapping[str, Any], where: str, unread: list[str] | None) -> dict[str, Any]:
    """Encodes a dict as JSON. A value that cannot be encoded raises CheckpointError or, with `unread`, is listed there and left out."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        at = f"{where}{key}"
        try:
            found[key] = encode(value, at)
        except CheckpointError as error:
            if unread is None:
                raise
            if type(value) is dict and all(type(inner) is str and not inner.startswith("$") for inner in value):
                found[key] = encoded(value, f"{at}.", unread)
            else:
                unread.append(str(error))
    return found


def decode(value: Any) -> Any:
    """Inverts `encode`; tensors are in memory."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((key, inner),) = value.items()
        if key.startswith("$"):
            return _special(key, inner)
    return {key: decode(item) for key, item in value.items()}


def _special(key: str, inner: Any) -> Any:
    match key:
        case "$bytes":
            return base64.b64decode(inner)
        case "$complex":
            return complex(*map(decode, inner))
        case "$dtype":
            return dtype_of(inner)
        case "$tuple":
            return tuple(map(decode, inner))
        case "$set":
            return set(map(decode, inner))
        case "$dict":
            return {decode(name): decode(item) for name, item in inner}
        case "$tensor":
            data, dtype = bytearray(base64.b64decode(inner["data"])), dtype_of(inner["dtype"])
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            return flat.reshape(inner["shape"])
    raise CheckpointError(f"an extra value has the unknown form {key}")
