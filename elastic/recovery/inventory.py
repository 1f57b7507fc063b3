"""What one worker still has after it has abandoned a step. Pure values.

An inventory is a promise: after sending it, its worker applies, acknowledges and replicates nothing for the old epoch. State "at step s" is
the state after applying step s; -1 is the initial state. All values in scalars, progress and results are JSON values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from elastic.layout.transfer import Role
from elastic.recovery.stored import Checkpoint

Scalars = dict[str, dict[str, Any]]
"""Parameter name -> optimizer state that has not the parameter's shape, such as a step count -> value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """The run `[start, stop)` (elements) of a layer as of `step`: parameter and all optimizer states, or the parameter only if gathered.

    `scalars`: whether the inventory has the scalars of its parameters at that step; of some replicas only their living owners know them.
    """

    layer: int
    start: int
    stop: int
    step: int
    role: Role
    digest: str | None = None
    scalars: bool = True

    @property
    def full(self) -> bool:
        """Whether it has the optimizer's states too."""
        return self.role != "gathered"

    def to_json(self) -> list[Any]:
        """One flat list."""
        return [self.layer, self.start, self.stop, self.step, self.role, self.digest, self.scalars]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Copy:
        """The inverse of `to_json`."""
        layer, start, stop, step, role, digest, scalars = data
        return cls(layer=layer, start=start, stop=stop, step=step, role=role, digest=digest, scalars=scalars)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What goes with a step besides tensors: its `apply` decision, and the settings after it: scheduler, parameter groups, and attributes
    of layers that loop bodies have set. `body`: what the step's own loop body changed is in these already.

    The decision is None where the step was taken by another job, or before all who live: it came from a checkpoint.
    """

    step: int
    apply: dict[str, Any] | None
    scheduler: dict[str, Any] | None = None
    groups: list[dict[str, Any]] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)
    body: bool = True

    def to_json(self) -> list[Any]:
        """One flat list."""
        return [self.step, self.apply, self.scheduler, self.groups, self.attributes, self.body]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Progress:
        """The inverse of `to_json`."""
        step, apply, scheduler, groups, attributes, body = data
        return cls(step=step, apply=apply, scheduler=scheduler, groups=groups, attributes=attributes, body=body)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedGrains:
    """What is left of step `step` that a worker gave up: it has gradient sums of `layers`, in which `grains` are finished.

    Some of the sums cover `summed` grains: they are of use only to the worker that is to compute all of these.
    """

    step: int
    layers: range
    grains: tuple[int, ...]
    summed: tuple[int, ...]

    def to_json(self) -> list[Any]:
        """One short list."""
        return [self.step, [self.layers.start, self.layers.stop], list(self.grains), list(self.summed)]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> FinishedGrains:
        """The inverse of `to_json`."""
        step, layers, grains, summed = data
        return cls(step=step, layers=range(*layers), grains=tuple(grains), summed=tuple(summed))


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """Everything of one worker: the newest step it has yielded (-1: none), its complete verified copies, and what goes with each step.

    `amid`: it is in the loop body of that step still, in something that others take part in. `changes` is what loop bodies have changed,
    as `History.changes` tells it, and `objects` has `[step, states]` of registered objects behind the newest loop body that is over here.

    `finished` is what it has of a step that it did not complete. `states` maps each optimizer state to its dtype name, or to "same" where
    that is the layer's. `scalars` and `progress` are by step.
    `results` are `[name, result]` of the last collectives, such as evaluations, that were finished here. `rewound`: yielded steps are
    being taken again, from a checkpoint on. `checkpoint` is the newest one that the worker sees, where it was asked
    for that, and `unreadable` names those that it could not read.
    `buffers` has the steps behind which the worker knows the buffers that training changes, with digests; it is empty where there are none.
    """

    worker: int
    yielded: int
    copies: tuple[Copy, ...]
    states: dict[str, str] = field(default_factory=dict)
    scalars: dict[int, Scalars] = field(default_factory=dict)
    progress: dict[int, Progress] = field(default_factory=dict)
    results: list[Any] = field(default_factory=list)
    finished: FinishedGrains | None = None
    rewound: bool = False
    checkpoint: Checkpoint | None = None
    unreadable: tuple[str, ...] = ()
    buffers: dict[int, str] = field(default_factory=dict)
    amid: bool = False
    changes: list[Any] = field(default_factory=list)
    objects: list[Any] | None = None

    @property
    def floor(self) -> int:
        """The oldest step that this worker can go on from: only the newest of what it has handed out is taken again, or everything."""
        return -1 if self.rewound else max(-1, self.yielded - 1)

    @property
    def seen(self) -> int:
        """The newest step whose loop body is over here."""
        return self.yielded - self.amid

    def to_json(self) -> dict[str, Any]:
        """JSON types only; `from_json` gives back an equal inventory."""
        return {
            "worker": self.worker,
            "yielded": self.yielded,
            "copies": [copy.to_json() for copy in self.copies],
            "states": self.states,
            "scalars": {str(step): scalars for step, scalars in self.scalars.items()},
            "progress": [progress.to_json() for progress in self.progress.values()],
            "results": self.results,
            "finished": None if self.finished is None else self.finished.to_json(),
            "rewound": self.rewound,
            "amid": self.amid,
            "changes": self.changes,
            "objects": self.objects,
            "checkpoint": None if self.checkpoint is None else self.checkpoint.to_json(),
            "unreadable": list(self.unreadable),
            "buffers": {str(step): digest for step, digest in self.buffers.items()},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Inventory:
        """The inverse of `to_json`."""
        return cls(
            worker=data["worker"],
            yielded=data["yielded"],
            copies=tuple(Copy.from_json(copy) for copy in data["copies"]),
            states=data["states"],
            scalars={int(step): scalars for step, scalars in data["scalars"].items()},
            progress={progress.step: progress for progress in map(Progress.from_json, data["progress"])},
            results=data["results"],
            finished=None if data["finished"] is None else FinishedGrains.from_json(data["finished"]),
            rewound=data["rewound"],
            amid=data["amid"],
            changes=data["changes"],
            objects=data["objects"],
            checkpoint=None if data["checkpoint"] is None else Checkpoint.from_json(data["checkpoint"]),
            unreadable=tuple(data["unreadable"]),
            buffers={int(step): digest for step, digest in data["buffers"].items()},
        )
