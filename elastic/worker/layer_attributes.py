"""Tracks plain attributes of layers that a loop body sets, such as a temperature or a dropout rate: settings like a learning rate.

A loop body acts on the steps after it. When a step is taken again, attributes that its body set must have the values from before it.
"""

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

_log = logging.getLogger(__name__)
_PLAIN = (bool, int, float, str, type(None))


def _plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(_plain, value)))


class Attributes:
    """The attributes of a model's layers that loop bodies have changed, and their values. A key is `layer's name:attribute`.

    The original value of an attribute that a body added is `ABSENT`.
    """

    def __init__(self, root: nn.Module) -> None:
        self._modules = [(name, vars(module)) for name, module in root.named_modules()]
        self._dicts = [values for _, values in self._modules]
        self._originals: dict[str, tuple[dict[str, Any], str, Any]] = {}  # of attributes that were ever changed
        self._names: list[str] = []
        self._values: list[Any] = []
        self._sizes: list[int] = []
        self._watching = self._warned = False
        self._included: set[str] = set()

    def include(self, name: str, values: dict[str, Any], attributes: Iterable[str]) -> None:
        """Treats these attributes of an object that is no layer as settings too, from now on; `name` stands for the layer's."""
        self._included.add(name)
        for attribute in attributes:
            self._originals[f"{name}:{attribute}"] = (values, attribute, values[attribute])

    def place(self, key: str) -> str:
        """Returns the layer, or what else has the attribute, in words."""
        layer, _, _ = key.rpartition(":")
        return layer if layer in self._included else f"layer {layer}" if layer else "layer the model"

    def watch(self) -> None:
        """Starts to attribute changes to the loop body."""
        self._watching = True
        # References, not ids: the address of a freed value may be used again.
        self._names, self._values = list(itertools.chain.from_iterable(self._dicts)), self._all_values()
        self._sizes = list(map(len, self._dicts))

    def _all_values(self) -> list[Any]:
        return list(itertools.chain.from_iterable(map(dict.values, self._dicts)))

    def changed(self) -> dict[str, Any]:
        """Returns the attributes first changed since `watch`, with their values at that call; absent ones are `ABSENT`.

        Later changes, such as by layers that run, are not attributed to the loop body until `watch` is called again.
        """
        if not self._watching:
            return {}
        self._watching = False
        now = self._all_values()
        if len(now) == len(self._values) and all(map(operator.is_, now, self._values)):
            return {}
        found: dict[str, Any] = {}
        position = 0
        for (layer, values), size in zip(self._modules, self._sizes, strict=True):
            run = slice(position, position + size)
            before = dict(zip(self._names[run], self._values[run], strict=True))
            position += size
            for name in dict.fromkeys([*before, *values]):
                old, new = before.get(name, ABSENT), values.get(name, ABSENT)
                key = f"{layer}:{name}"
                if new is old or key in self._originals:
                    continue
                if all(value is ABSENT or _plain(value) for value in (old, new)):
                    self._originals[key] = (values, name, old)
                    found[key] = old
                else:
                    self._warn(key, new)
        return found

    def _warn(self, key: str, value: Any) -> None:
        if not self._warned:
            self._warned = True
            layer, _, attribute = key.partition(":")
            _log.warning(
                "the loop body sets attribute %r of layer %r to a %s: only numbers, strings and tuples of them are restored, so a step "
                "that is taken again after a loss may have a different result; use such values",
                attribute,
                layer,
                type(value).__name__,
            )

    def original(self, key: str) -> Any:
        """Returns an attribute's value before any loop body."""
        return self._originals[key][2] if key in self._originals else ABSENT

    def read(self) -> dict[str, Any]:
        """Returns the current values of the attributes that loop bodies have changed."""
        return {key: values[name] for key, (values, name, _) in self._originals.items() if name in values}

    def write(self, settings: Mapping[str, Any]) -> None:
        """Sets these attributes; resets changed ones that are not named to their values before any loop body."""
        for key in settings:
            if key not in self._originals:
                layer, _, name = key.rpartition(":")
                values = next((values for module, values in self._modules if module == layer), None)
                if values is not None:
                    self._originals[key] = (values, name, values.get(name, ABSENT))
        for key, (values, name, original) in self._originals.items():
            value = settings.get(key, original)
            if value is ABSENT:
                values.pop(name, None)
            else:
                values[name] = value


class _Absent:
    pass


ABSENT = _Absent()
"""Stands for the value of an attribute that does not exist."""
