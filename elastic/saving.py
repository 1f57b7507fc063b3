"""What members tell each other before a save, and what the checkpoint then holds: the same on each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from checkpoint.state import PARAM, Contents, Group, Spec
from elastic.restore import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one member tells the others before a save: dtypes of the states that it owns, numbers by parameter, and whether it is busy.

    All must tell it in the same `view`; where some had finished the round when others were lost, the rest hear what was told in the view
    before.

    `base` is the epoch of the newest checkpoint when its job began, None on a worker that does not know; then `hint` is that of the newest
    one now.
    """

    view: int
    states: Mapping[str, Mapping[str, str]]
    numbers: Mapping[str, Mapping[str, float | int | bool]]
    busy: bool
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


def states_of(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """Parameter -> state -> dtype."""
    found: dict[str, dict[str, str]] = {}
    for run in runs:
        found.setdefault(run.name, {})[run.state] = str(run.values.dtype).removeprefix("torch.")
    return found


def contents_of(
    shapes: Mapping[str, tuple[int, ...]],
    shares: Sequence[Share],
    *,
    rest: Mapping[str, Spec],
    groups: Sequence[Group],
    ties: Mapping[str, str],
    buffers: frozenset[str],
    step: int,
    extra: Mapping[str, Any],
    files: Mapping[str, bytes],
) -> Contents:
    """What the checkpoint holds, from what all members told: the same on each of them. `rest` are frozen parameters and buffers."""
    states: dict[str, dict[str, str]] = {}
    numbers: dict[str, Mapping[str, float | int | bool]] = {}
    for share in shares:
        for name, dtypes in share.states.items():
            states.setdefault(name, {}).update(dtypes)
        numbers.update(share.numbers)
    tensors: dict[str, dict[str, Spec]] = {}
    for name, shape in shapes.items():
        ordered = [PARAM, *sorted(state for state in states.get(name, {}) if state != PARAM)]
        tensors[name] = {state: Spec(shape=shape, dtype=states[name][state]) for state in ordered}
    return Contents(
        tensors={**tensors, **{name: {PARAM: spec} for name, spec in rest.items()}},
        scalars={name: numbers[name] for name in shapes if name in numbers},
        groups=tuple(groups),
        ties=ties,
        frozen=frozenset(rest) - buffers,
        buffers=buffers,
        step=step,
        extra=extra,
        files=files,
    )
