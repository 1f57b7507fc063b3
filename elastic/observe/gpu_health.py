"""What a GPU's own counters say about it: errors of its memory and Xid events, before and after a worker was lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

NAMES = {
    "ecc_corrected": "corrected ECC errors",
    "ecc_uncorrected": "uncorrected ECC errors",
    "retired_pages": "retired pages",
    "remapped_rows": "remapped rows",
}
"""The counters, with their names for people. ECC errors are those since the driver was loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuHealth:
    """The counters of the GPU `gpu` of a lost worker: `before`, when the worker began to use it, and `after` its end.

    A counter that the GPU does not have, or that could not be read, is missing. `xids` are the driver's Xid events since the worker began,
    None if the driver does not tell them. `unreadable`: why nothing could be read after the worker's end.
    """

    worker: int
    gpu: str
    before: Mapping[str, int] = field(default_factory=dict)
    after: Mapping[str, int] = field(default_factory=dict)
    xids: tuple[int, ...] | None = None
    unreadable: str | None = None

    @property
    def changed(self) -> dict[str, tuple[int, int]]:
        """The counters that were read before and after, and differ."""
        return {name: (self.before[name], now) for name, now in self.after.items() if self.before.get(name, now) != now}

    @property
    def notable(self) -> bool:
        """Whether the GPU has shown a fault."""
        return bool(self.xids or self.changed or self.unreadable)

    def __str__(self) -> str:
        parts = [f"Xid {', '.join(map(str, self.xids))}"] if self.xids else []
        parts += [f"{NAMES[name]} {then} -> {now}" for name, (then, now) in self.changed.items()]
        parts += [self.unreadable] if self.unreadable else []
        return f"GPU {self.gpu} of worker {self.worker}: {'; '.join(parts) or 'no counter has changed'}"

    def to_json(self) -> dict[str, Any]:
        """JSON types only; `from_json` gives back an equal value."""
        return {**asdict(self), "xids": None if self.xids is None else list(self.xids)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GpuHealth:
        """The inverse of `to_json`."""
        return cls(**{**data, "xids": None if data["xids"] is None else tuple(data["xids"])})
