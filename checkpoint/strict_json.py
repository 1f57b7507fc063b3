"""JSON from untrusted files: duplicate keys, NaN (by default), and excessive size or depth are errors.

Python floats that JSON cannot represent (an infinite clip norm is a legal hyperparameter) are written as `{"$float": "inf"}`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from elastic.errors import CheckpointError

MAX_ITEMS = 16_000_000
"""Most commas and opening brackets in one document: a list takes 56 times the memory of its text `[],`."""
_FLOAT = "$float"
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return found


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is too large for a number")
    return value


def loads(data: bytes, where: str, *, special_floats: bool = False) -> Any:
    """Parses a document. Raises CheckpointError with `where` and the reason.

    special_floats: whether NaN and Infinity are accepted, as Python's json writes them, and numbers that are too large for a float.
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_ITEMS:
        raise CheckpointError(f"{where}: more than {MAX_ITEMS} items")
    try:
        if special_floats:
            return json.loads(data.decode(), object_pairs_hook=_pairs)
        return json.loads(data.decode(), object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON ({error})") from error


def dumps(value: Any, where: str) -> bytes:
    """Writes a value compactly, in the order of the dicts. Raises CheckpointError if it is not JSON."""
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: cannot be written as JSON ({error})") from error


def with_special_floats(value: Any) -> Any:
    """Returns the value with NaN and infinities as objects, and tuples as lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: repr(value)}
    if isinstance(value, Mapping):
        return {key: with_special_floats(entry) for key, entry in value.items()}
    return [with_special_floats(entry) for entry in value] if isinstance(value, list | tuple) else value


def without_special_floats(value: Any) -> Any:
    """Inverts `with_special_floats`, except that tuples stay lists."""
    if isinstance(value, dict):
        if value.keys() == {_FLOAT} and value[_FLOAT] in list(_SPECIAL):
            return _SPECIAL[value[_FLOAT]]
        return {key: without_special_floats(entry) for key, entry in value.items()}
    return [without_special_floats(entry) for entry in value] if isinstance(value, list) else value
