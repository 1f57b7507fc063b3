"""The plan: which worker holds which layers and computes which grains. Jobs, clusters and files use the same type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

from elastic.errors import PlanError
from elastic.plan.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A contiguous run of layers and the workers that hold them.

    With tensor parallelism a member is a group of devices: `groups` lists each member's group, which begins with the member itself. It is
    empty if every member is one device.
    """

    layers: range
    members: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.groups and tuple(group[:1] for group in self.groups) != tuple((member,) for member in self.members):
            raise PlanError(f"the groups {self.groups} of a stage must begin with its members {self.members}, one each")

    @property
    def devices(self) -> tuple[int, ...]:
        """All devices that hold a part of the layers."""
        return tuple(device for group in self.groups for device in group) if self.groups else self.members

    def renamed(self, names: Mapping[int, int]) -> Stage:
        """Returns the same stage with other workers in the same places."""
        groups = tuple(tuple(names[device] for device in group) for group in self.groups)
        return replace(self, members=tuple(names[worker] for worker in self.members), groups=groups)

    def __str__(self) -> str:
        return f"[{self.layers.start}-{self.layers.stop - 1}]x{len(self.members)}"


class Order(TypedDict):
    """Arguments of `schedule.build` and `memory.needs_in`; `Plan` says what they are."""

    split: bool
    dealt: bool
    eager: int


_PLAIN = "step_s", "why", "split", "dealt", "eager"
"""Fields of a plan that are written as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Stages in order; per stage, the worker of each grain; the predicted seconds of a step; and a sentence on why this plan was chosen.

    `clocks` has the clock of each stage's GPUs in MHz, None for the usual one; it is empty if no clock is chosen. `split`: backwards are
    computed in two parts, of which the second fills waiting times (`elastic.plan.scheduling`). `dealt`: micro-batches are dealt out among
    stages of different widths (`elastic.plan.dealing`). `eager`: how many micro-batches more than in 1F1B a stage may hold
    (`elastic.plan.eager`). Raises PlanError unless the stages hold layers 0, 1, ... in order, no worker is in two stages, and routes stay
    within their stage.
    """

    stages: tuple[Stage, ...]
    routes: tuple[tuple[int, ...], ...]
    step_s: float
    why: str
    clocks: tuple[int | None, ...] = ()
    split: bool = False
    dealt: bool = False
    eager: int = 0

    def __post_init__(self) -> None:
        start = 0
        for number, stage in enumerate(self.stages):
            if stage.layers.start != start or not stage.layers or stage.layers.step != 1 or not stage.members:
                raise PlanError(f"stage {number} has layers {stage.layers} and members {stage.members}; layer {start} comes next")
            start = stage.layers.stop
        if self.clocks and len(self.clocks) != len(self.stages):
            raise PlanError(f"{len(self.stages)} stages have {len(self.clocks)} clocks")
        devices = self.devices
        if len(set(devices)) < len(devices):
            raise PlanError(f"a worker has two places in the stages: {devices}")
        if len(self.routes) != len(self.stages) or len({len(route) for route in self.routes}) > 1:
            raise PlanError(f"{len(self.stages)} stages need as many routes of equal length, not {self.routes}")
        for number, (stage, route) in enumerate(zip(self.stages, self.routes, strict=True)):
            if strangers := set(route).difference(stage.members):
                raise PlanError(f"routes of stage {number} name workers {sorted(strangers)}, which are not members of it")

    @property
    def order(self) -> Order:
        """What determines the order of actions besides stages and routes."""
        return Order(split=self.split, dealt=self.dealt, eager=self.eager)

    @property
    def workers(self) -> tuple[int, ...]:
        """All workers, in the order of their stages."""
        return tuple(worker for stage in self.stages for worker in stage.members)

    @property
    def devices(self) -> tuple[int, ...]:
        """All devices, in the order of their stages; equal to the workers if no member is a group."""
        return tuple(device for stage in self.stages for device in stage.devices)

    def renamed(self, names: Mapping[int, int]) -> Plan:
        """Returns the same plan with other workers in the same places."""
        routes = tuple(tuple(names[worker] for worker in route) for route in self.routes)
        return replace(self, stages=tuple(stage.renamed(names) for stage in self.stages), routes=routes)

    @property
    def summary(self) -> str:
        """The layers and the number of workers of each stage, such as `[0-4]x2 [5-9]x2`."""
        return " ".join(str(stage) for stage in self.stages)

    def stage_of(self, worker: int) -> int:
        """Returns the number of the worker's stage. Raises PlanError if it has none."""
        for number, stage in enumerate(self.stages):
            if worker in stage.members:
                return number
        raise PlanError(f"worker {worker} has no stage in the plan {self.summary}")

    def micro_batches_of(self, worker: int, workload: Workload) -> tuple[int, ...]:
        """Returns the micro-batches that are routed to `worker`, ascending."""
        route = self.routes[self.stage_of(worker)]
        return tuple(micro_batch for grain, to in enumerate(route) if to == worker for micro_batch in workload.micro_batches_of(grain))

    def to_json(self) -> dict[str, Any]:
        """Writes a short list per stage and per route."""
        stages: list[Sequence[Any]] = [[stage.layers.start, stage.layers.stop, list(stage.members)] for stage in self.stages]
        routes = [list(route) for route in self.routes]
        found = {"stages": stages, "routes": routes} | {name: getattr(self, name) for name in _PLAIN}
        return {**found, "clocks": list(self.clocks)} if self.clocks else found

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The inverse of `to_json`."""
        stages = tuple(Stage(layers=range(start, stop), members=tuple(members)) for start, stop, members in data["stages"])
        routes, clocks = tuple(tuple(route) for route in data["routes"]), tuple(data.get("clocks", ()))
        chosen = {name: data[name] for name in _PLAIN}
        return cls(stages=stages, routes=routes, clocks=clocks, **chosen)
