"""The members of one view, as callbacks, files and pages show them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it takes long to load, and launchers do not need it
    from elastic.view import View


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMembers:
    """The layers `[start, stop)` of one stage, and its workers."""

    start: int
    stop: int
    workers: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """The members of a job from view number `epoch` on. `hosts` has the host of each worker, by its number as text; `layout` is such as
    `[0-4]x2 [5-9]x2`. Worker `leader` has place 0."""

    epoch: int
    layout: str
    workers: tuple[int, ...]
    leader: int
    stages: tuple[StageMembers, ...]
    hosts: Mapping[str, str]

    @classmethod
    def of(cls, view: View) -> Members:
        """Returns those of a view."""
        stages = (StageMembers(start=s.layers.start, stop=s.layers.stop, workers=tuple(s.members)) for s in view.plan.stages)
        return cls(
            epoch=view.epoch,
            layout=view.plan.summary,
            workers=tuple(view.workers),
            leader=view.coordinator,
            stages=tuple(stages),
            hosts={str(member.worker): member.host for member in view.members},
        )

    def to_json(self) -> dict[str, Any]:
        """Returns JSON types only; `from_json` returns equal members."""
        stages = [{**asdict(stage), "workers": list(stage.workers)} for stage in self.stages]
        return {**asdict(self), "workers": list(self.workers), "stages": stages, "hosts": dict(self.hosts)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Members:
        """The inverse of `to_json`. Other fields are ignored."""
        stages = tuple(StageMembers(**{**stage, "workers": tuple(stage["workers"])}) for stage in data["stages"])
        kept = {name: data[name] for name in ("epoch", "layout", "leader", "hosts")}
        return cls(**kept, workers=tuple(data["workers"]), stages=stages)
