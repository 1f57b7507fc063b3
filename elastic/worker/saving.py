"""What members tell each other before a save, and what the checkpoint then holds: the same on each of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from elastic.checkpoint.state import PARAM, Contents, Group, Spec
from elastic.engine.shard import Scalars, Shard, in_memory
from elastic.errors import CheckpointError
from elastic.layout.regions import ModelSpec
from elastic.worker.restore import is_whole

StatesToSave = dict[str, dict[str, str]]
"""Parameter -> state -> dtype, as torch names it without `torch.`; where its shape is not the parameter's, with that: `float32[8, 1]`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one member tells the others before a save: which states it owns, as a digest, and whether it is busy.

    All must tell it in the same `view`; where some had finished the round when others were lost, the rest hear what was told in the view
    before. `known` is the digest of all members' states when they last told each other these: they rarely change.

    `token` is a new one; that of the coordinator is the save's.

    `base` is the epoch of the newest checkpoint when its job began, None on a worker that does not know; then `hint` is that of the newest
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
    """The epoch that the job's own epochs are counted from, so that those of a later job are greater. All founders may be gone."""
    return min((share.base for share in shares if share.base is not None), default=max(share.hint for share in shares))


def states_of(shards: Iterable[tuple[Shard, Scalars]], spec: ModelSpec) -> StatesToSave:
    """Of the parameters in the shards. Raises CheckpointError for state that is neither a number nor of the parameter's shape."""
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


def digest_of(value: Any) -> str:
    """Equal for equal JSON values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def merged(all_states: Iterable[StatesToSave]) -> StatesToSave:
    """Everything that is owned by somebody."""
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
    buffers: frozenset[str],
    step: int,
    extra: Mapping[str, Any],
    files: Mapping[str, bytes],
) -> Contents:
    """What the checkpoint holds: the same on all members, but for `scalars`. `rest` are frozen parameters and buffers."""
    tensors: dict[str, dict[str, Spec]] = {}
    for name, shape in shapes.items():
        ordered = [PARAM, *sorted(state for state in states[name] if state != PARAM)]
        tensors[name] = {state: _spec(states[name][state], shape) for state in ordered}
    return Contents(
        tensors={**tensors, **{name: {PARAM: spec} for name, spec in rest.items()}},
        scalars=scalars,
        groups=tuple(groups),
        frozen=frozenset(rest) - buffers,
        buffers=buffers,
        step=step,
        extra=extra,
        files=files,
    )
