"""Findings: state in memory that is not as it should be. A finding says what is wrong, where, and since when."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Elements `[start, stop)` of a layer's vector of one `state`, as of `step`, that are wrong, or of which copies differ.

    `worker` on `host` holds them as `copy` (words such as "its own"); the worker is None if nothing shows which of the copies is wrong.
    `parameters` lie at these elements. `digests` are those that differ, by what they are of. `good`: the newest step after which the state
    is known to have been right (-2: none is known).
    """

    state: str
    layer: int
    start: int
    stop: int
    step: int
    good: int
    copy: str
    worker: int | None = None
    host: str | None = None
    parameters: tuple[str, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        where = f"{self.copy} {self.state} of layer {self.layer}, run [{self.start}, {self.stop}), as of step {self.step}"
        return f"{where}{self._of}: {self._digests}; it was right after step {self.good}"

    @property
    def _of(self) -> str:
        more = f" and {len(self.parameters) - _NAMED} more" if len(self.parameters) > _NAMED else ""
        return f" (of {', '.join(self.parameters[:_NAMED])}{more})" if self.parameters else ""

    @property
    def _digests(self) -> str:
        return ", ".join(f"{digest} {of}" for of, digest in self.digests.items())

    def to_json(self) -> dict[str, Any]:
        """JSON types only; `from_json` gives back an equal finding."""
        return {**{each.name: getattr(self, each.name) for each in dataclasses.fields(self)}, "parameters": list(self.parameters)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Finding:
        """The inverse of `to_json`."""
        return cls(**{**data, "parameters": tuple(data["parameters"])})


def parameters_in(parameters: Sequence[Any], start: int, stop: int) -> tuple[str, ...]:
    """Returns the names of the parameters, each with `name`, `start` and `stop`, that lie in a run."""
    return tuple(parameter.name for parameter in parameters if parameter.start < stop and parameter.stop > start)
