"""Inventories: the state that one worker has after abandoning a step. Pure values.

An inventory is a promise: after sending it, its worker applies, acknowledges and replicates nothing for the old epoch. State "at step s" is
the state after applying step s; -1 is the initial state. All values in scalars, progress and results are JSON values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from elastic.layout.transfer import Role
from elastic.recovery.checkpoint_fallback import Checkpoint

Scalars = dict[str, dict[str, Any]]
"""Maps parameter name and optimizer state (one without the parameter's shape, such as a step count) to its value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """The run `[start, stop)` (elements) of a layer as of `step`: parameter and all optimizer states, or the parameter only if gathered.

    `scalars`: whether the inventory has its parameters' scalars at that step; those of some replicas are known only to their living owners.
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
        """Whether the copy includes the optimizer states."""
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
    """A step's values besides tensors: its `apply` decision, and the settings after it (scheduler, parameter groups, layer attributes).

    The attributes are those that loop bodies have set. `body`: the settings include the changes of the step's own loop body. `apply` is
    None for a step loaded from a checkpoint: another job took it, or it was taken before all living workers joined.
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
    """The gradient sums that a worker keeps of an abandoned step: sums of `layers`, in which `grains` are finished.

    The sums cover the `summed` grains: they are usable only if the worker is assigned all of these. Of the `begun` grains it holds a part
    of their computation.
    """

    step: int
    layers: range
    grains: tuple[int, ...]
    summed: tuple[int, ...]
    begun: tuple[int, ...] = ()

    @property
    def held(self) -> frozenset[int]:
        """The grains that must be routed to the worker: also finished ones that no sum covers, since no parameter has a gradient."""
        return frozenset((*self.grains, *self.summed))

    def to_json(self) -> list[Any]:
        """One short list."""
        return [self.step, [self.layers.start, self.layers.stop], list(self.grains), list(self.summed), list(self.begun)]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> FinishedGrains:
        """The inverse of `to_json`."""
        step, layers, grains, summed, begun = data
        return cls(step=step, layers=range(*layers), grains=tuple(grains), summed=tuple(summed), begun=tuple(begun))


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """One worker's state: the newest step it has yielded (-1: none), its complete verified copies, and the values of each step.

    `amid`: the worker is still in that step's loop body, inside a collective call. `changes` lists what loop bodies have changed (as
    `History.changes` returns it). `objects` is `[step, states]` of registered objects after the newest loop body that has ended here.

    `finished` is the worker's part of a step that it did not complete, and of the one before. `states` maps each optimizer state to its
    dtype name, or to "same" for the layer's dtype. `scalars` and `progress` are by step.
    `results` are `[name, result]` of the last collectives, such as evaluations, that finished here. `rewound`: yielded steps are being
    taken again from a checkpoint. `checkpoint` is the newest one that the worker sees, if it was asked for it; `unreadable` names those
    that it could not read.
    `back`: copies of later steps than this one were found to differ between workers, so nothing is resumed from them; None: none were.
    `buffers` maps steps to digests of the buffers that training changes, as of these steps; it is empty if there are no such buffers.
    """

    worker: int
    yielded: int
    copies: tuple[Copy, ...]
    states: dict[str, str] = field(default_factory=dict)
    scalars: dict[int, Scalars] = field(default_factory=dict)
    progress: dict[int, Progress] = field(default_factory=dict)
    results: list[Any] = field(default_factory=list)
    finished: tuple[FinishedGrains, ...] = ()
    rewound: bool = False
    checkpoint: Checkpoint | None = None
    unreadable: tuple[str, ...] = ()
    buffers: dict[int, str] = field(default_factory=dict)
    amid: bool = False
    changes: list[Any] = field(default_factory=list)
    objects: list[Any] | None = None
    back: int | None = None

    @property
    def floor(self) -> int:
        """The oldest step that this worker can resume at: one before the newest yielded step; -1 (any) while steps are taken again."""
        return -1 if self.rewound else max(-1, self.yielded - 1)

    @property
    def seen(self) -> int:
        """The newest step whose loop body has ended on this worker."""
        return self.yielded - self.amid

    def finished_of(self, step: int) -> FinishedGrains | None:
        """What the worker keeps of a step, if anything."""
        return next((each for each in self.finished if each.step == step), None)

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
            "finished": [each.to_json() for each in self.finished],
            "rewound": self.rewound,
            "amid": self.amid,
            "changes": self.changes,
            "objects": self.objects,
            "checkpoint": None if self.checkpoint is None else self.checkpoint.to_json(),
            "unreadable": list(self.unreadable),
            "buffers": {str(step): digest for step, digest in self.buffers.items()},
            "back": self.back,
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
            finished=tuple(map(FinishedGrains.from_json, data["finished"])),
            rewound=data["rewound"],
            amid=data["amid"],
            changes=data["changes"],
            objects=data["objects"],
            checkpoint=None if data["checkpoint"] is None else Checkpoint.from_json(data["checkpoint"]),
            unreadable=tuple(data["unreadable"]),
            buffers={int(step): digest for step, digest in data["buffers"].items()},
            back=data["back"],
        )
