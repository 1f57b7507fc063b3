"""The values that members exchange before a save, and the checkpoint's contents, which follow from them and are equal on all members."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from elastic.checkpoint.state import PARAM, Contents, Group, Spec
from elastic.engine.shard import Scalars, Shard, in_memory
from elastic.errors import CheckpointError
from elastic.layout.regions import ModelSpec
from elastic.memory.digest import checksum_of
from elastic.worker.restore import is_whole

StatesToSave = dict[str, dict[str, str]]
"""Maps parameter and state to the dtype's name without `torch.`; a shape that is not the parameter's is appended: `float32[8, 1]`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One member's message to the others before a save: a digest of the states that it owns, and whether it is still saving (`busy`).

    All must send it in the same `view`; if some had finished the round when members were lost, the others receive messages of the previous
    view. `known` is the digest of all members' states at their last exchange: they rarely change.

    `token` is a new one; the save uses the coordinator's.

    `base` is the epoch of the newest checkpoint when the job began, None on a worker that joined later; `hint` is then that of the newest
    one now.
    """

    view: int
    states: str
    known: str | None
    busy: bool
    token: str
    base: int | None
    hint: int

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Share:
        return cls(**data)


def base_of(shares: Sequence[Share]) -> int:
    """Returns the epoch to which the job's epochs are added, so that a later job's are greater. All founders may be gone."""
    return min((share.base for share in shares if share.base is not None), default=max(share.hint for share in shares))


def states_of(shards: Iterable[tuple[Shard, Scalars]], spec: ModelSpec) -> StatesToSave:
    """Returns the states in the shards. Raises CheckpointError for one that is neither a number nor of the parameter's shape."""
    found: StatesToSave = {}
    for shard, scalars in shards:
        dtypes = {state: str(memory.dtype).removeprefix("torch.") for state, memory in shard.memory.items()}
        for parameter, _, _ in shard.parameters(spec):
            own = found.setdefault(parameter.name, {PARAM: dtypes[PARAM]})
            for state, value in scalars.get(parameter.name, {}).items():
                if in_memory(value):
                    own[state] = dtypes[state]
                elif is_whole(value, spec.cut):
                    own[state] = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
                elif not isinstance(value, bool | int | float) and not (isinstance(value, torch.Tensor) and value.numel() == 1):
                    raise CheckpointError(
                        f"the optimizer's state {state!r} of {parameter.name} is neither a number nor of the parameter's shape: "
                        "checkpoints cannot hold that yet"
                    )
    return found


def _spec(form: str, shape: tuple[int, ...]) -> Spec:
    dtype, bracket, own = form.partition("[")
    return Spec(shape=tuple(json.loads(bracket + own)) if bracket else shape, dtype=dtype)


def unchanged(
    shards: Iterable[tuple[Shard, Scalars]], known: Mapping[tuple[int, int], Mapping[str, str]], worker: int, spec: ModelSpec
) -> Callable[[], None]:
    """Returns a function that raises CheckpointError if the memory of shards no longer has the checksums `known` by layer and start."""
    memory = [(shard, dict(shard.memory)) for shard, _ in shards]

    def check() -> None:
        for shard, states in memory:
            for state, checksum_then in known.get((shard.layer, shard.interval.start), {}).items():
                if checksum_of(states[state]) != checksum_then:
                    run = f"{spec.layers[shard.layer].title}, run [{shard.interval.start}, {shard.interval.stop})"
                    raise CheckpointError(
                        f"on worker {worker}, memory has changed while nothing wrote to it: {state} of {run}, was "
                        "not written as it was computed; the memory of its host may be faulty"
                    )

    return check


def digest_of(value: Any) -> str:
    """Returns the digest of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def merged(all_states: Iterable[StatesToSave]) -> StatesToSave:
    """Returns the states that any member owns."""
    found: StatesToSave = {}
    for states in all_states:
        for name, dtypes in states.items():
            found.setdefault(name, {}).update(dtypes)
    return found


def contents_of(
    shapes: Mapping[str, tuple[int, ...]],
    states: StatesToSave,
    *,
    scalars: Mapping[str, Mapping[str, float | int | bool]],
    rest: Mapping[str, Spec],
    groups: Sequence[Group],
    frozen: Iterable[str],
    buffers: frozenset[str],
    step: int,
    extra: Mapping[str, Any],
    files: Mapping[str, bytes],
) -> Contents:
    """Returns the checkpoint's contents, equal on all members except for `scalars`. `rest` has what every worker holds."""
    tensors: dict[str, dict[str, Spec]] = {}
    for name, shape in shapes.items():
        ordered = [PARAM, *sorted(state for state in states[name] if state != PARAM)]
        tensors[name] = {state: _spec(states[name][state], shape) for state in ordered}
    return Contents(
        tensors={**tensors, **{name: {PARAM: spec} for name, spec in rest.items()}},
        scalars=scalars,
        groups=tuple(groups),
        frozen=frozenset(frozen),
        buffers=buffers,
        step=step,
        extra=extra,
        files=files,
    )
