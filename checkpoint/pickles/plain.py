"""Converts values of a pickle to JSON, as far as possible."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from typing import Any

from elastic.checkpoint.pickles.values import Opaque
from elastic.checkpoint.stored import is_tensor

_DEPTH = 40
_NODES = 1_000_000


def plain(value: Any, dropped: list[str] | None = None) -> Any:
    """Returns `value` as JSON: tuples as lists, namespaces as mappings, an enum's member as its value.

    Values without such a form (tensors, other objects, values that contain themselves, NaN, infinities) become None; their paths are
    added to `dropped`.
    """
    return _Plain([] if dropped is None else dropped).convert(value, "", 0)


def number(value: Any) -> float | int | None:
    """Returns the number in a value, a member of an enum, or a tensor without dimensions; None for anything else."""
    if isinstance(value, Opaque):
        value = value.args[0] if len(value.args) == 1 else None
    elif is_tensor(value) and value.spec.shape == ():
        value = value.run(0, 1).item()
    return value if isinstance(value, (int, float)) else None


class _Plain:
    def __init__(self, dropped: list[str]) -> None:
        self.dropped = dropped
        self.nodes = 0

    def convert(self, value: Any, path: str, depth: int) -> Any:
        self.nodes += 1
        if depth > _DEPTH or self.nodes > _NODES:
            return self._drop(path)
        if isinstance(value, enum.Enum):
            value = value.value
        if isinstance(value, Opaque):
            return self._opaque(value, path, depth)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else self._drop(path)
        if value is None or isinstance(value, (str, bool, int)):
            return value
        if isinstance(value, Mapping):
            return {str(key): self.convert(one, f"{path}/{key}", depth + 1) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.convert(one, f"{path}/{index}", depth + 1) for index, one in enumerate(value)]
        if isinstance(value, (set, frozenset)):
            return sorted(value, key=repr)
        return self._drop(path)

    def _opaque(self, value: Opaque, path: str, depth: int) -> Any:
        if isinstance(value.state, dict) and not value.args:
            return self.convert(value.state, path, depth + 1)
        if len(value.args) == 1 and isinstance(value.args[0], (str, int, float)) and value.state is None:
            return value.args[0]
        return self._drop(path)

    def _drop(self, path: str) -> None:
        self.dropped.append(path)
