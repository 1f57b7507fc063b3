"""What a pickle's names and calls become: values that do nothing.

A name that is not known stays a `Global`, a call of it an `Opaque` that keeps what it was given. Nothing is ever imported or called.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Global:
    """A name in a module, such as `deepspeed.runtime.zero.config` and `ZeroStageEnum`. Not imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Opaque:
    """An object of a class that is not known: what it would have been made from, and what would have been put into it."""

    cls: Global
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<{self.cls}, not loaded>"

    def attribute(self, name: str) -> Any:
        """The attribute that its `__dict__` or its slots would hold; None without one."""
        parts = self.state if isinstance(self.state, tuple) and len(self.state) == 2 else (self.state,)
        return next((part[name] for part in parts if isinstance(part, dict) and name in part), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class PickledStorage:
    """A reference to the member `data/<key>`: its elements and their dtype's name, None if it counts bytes."""

    key: str
    dtype: str | None
    count: int
