"""Inert values that stand for a pickle's names and calls.

An unknown name stays a `Global`; a call of it becomes an `Opaque` that keeps its arguments. Nothing is ever imported or called.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Global:
    """A name in a module, such as `deepspeed.runtime.zero.config` and `ZeroStageEnum`. It is not imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Opaque:
    """An object of an unknown class: the arguments of its constructor, its state, and the items that the pickle puts into it."""

    cls: Global
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<{self.cls}, not loaded>"

    def attribute(self, name: str) -> Any:
        """Returns the attribute that its `__dict__` or its slots would hold; None if there is none."""
        parts = self.state if isinstance(self.state, tuple) and len(self.state) == 2 else (self.state,)
        return next((part[name] for part in parts if isinstance(part, dict) and name in part), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class PickledStorage:
    """A reference to the member `data/<key>`. count: its elements. dtype: its name, None for a storage that counts bytes."""

    key: str
    dtype: str | None
    count: int
