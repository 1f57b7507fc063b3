"""The settings that a step is taken with and a loop body may change: parameter groups, scheduler state, layers' attributes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from elastic.engine.zero import ShardedOptimizer
from elastic.worker.layer_attributes import ABSENT, Attributes
from elastic.worker.plain_state import NestedObject, capture, from_plain, revive, to_plain


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings at one moment; `attributes` are those that any loop body has changed."""

    groups: list[dict[str, Any]]
    scheduler: dict[str, Any] | None = None
    attributes: dict[str, Any] = field(default_factory=dict)

    def named(self, attributes: Attributes) -> list[Any]:
        """Returns all settings as `[[name, value as text], ...]`, to be compared between workers."""
        found = [
            [f"{name} of parameter group {number}", _text(value)]
            for number, group in enumerate(self.groups)
            for name, value in group.items()
        ]
        found += [[f"{name} of the scheduler", _text(value)] for name, value in (self.scheduler or {}).items()]
        for key, value in sorted(self.attributes.items()):
            if value is not ABSENT and not same(value, attributes.original(key)):
                found.append([f"{key.rpartition(':')[2]} of {attributes.place(key)}", _text(value)])
        return found

    def digest(self, attributes: Attributes) -> str:
        """Returns a digest of `named`."""
        return hashlib.blake2b(repr(self.named(attributes)).encode(), digest_size=16).hexdigest()


def _text(value: Any) -> str:
    """Returns the exact value as text; of a value without a JSON form, such as a function, only its type."""
    if isinstance(value, bool | int | float | str | None):
        return repr(value)
    try:
        return json.dumps(to_plain(value))
    except TypeError:
        return type(value).__name__


def compared(told: Mapping[int, Any]) -> str:
    """Returns a sentence that names the first setting that differs between workers, from each worker's `Settings.named`."""
    by_worker = {worker: dict(pairs) for worker, pairs in told.items()}
    names = dict.fromkeys(name for values in by_worker.values() for name in values)
    for name in names:
        workers: dict[str, list[int]] = {}
        for worker, values in by_worker.items():
            workers.setdefault(values.get(name, "unchanged"), []).append(worker)
        if len(workers) > 1:
            parts = [f"{value} on worker{'s' * (len(who) > 1)} {', '.join(map(str, who))}" for value, who in workers.items()]
            return f"{name} is {' and '.join(parts)}"
    return "digests of settings differ, but no single value does"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """The changes of one loop body: `groups` are `(number, setting, value)`; a changed scheduler's state is stored as a whole."""

    groups: tuple[tuple[int, str, Any], ...]
    scheduler: dict[str, Any] | None
    attributes: dict[str, Any]

    def made_to(self, settings: Settings) -> Settings:
        """Returns the settings with this change applied."""
        groups = [dict(group) for group in settings.groups]
        for number, name, value in self.groups:
            groups[number][name] = value
        scheduler = settings.scheduler if self.scheduler is None else self.scheduler
        return Settings(groups=groups, scheduler=scheduler, attributes={**settings.attributes, **self.attributes})

    def to_plain(self) -> list[Any]:
        """Returns JSON types only. A scheduler's state without a JSON form is left out, and a joining worker then raises an error."""
        groups = [[number, name, to_plain(value)] for number, name, value in self.groups]
        return [groups, plain_or_none(self.scheduler), {name: to_plain(value) for name, value in self.attributes.items()}]

    @classmethod
    def from_plain(cls, data: Sequence[Any]) -> Change:
        """The inverse of `to_plain`."""
        groups, scheduler, attributes = data
        return cls(
            groups=tuple((number, name, from_plain(value)) for number, name, value in groups),
            scheduler=None if scheduler is None else from_plain(scheduler),
            attributes={name: from_plain(value) for name, value in attributes.items()},
        )


def plain_or_none(state: Mapping[str, Any] | None) -> Any:
    """Returns the state as JSON types, None if it has no JSON form."""
    try:
        return None if state is None else to_plain(dict(state))
    except TypeError:
        return None


def read(optimizer: ShardedOptimizer, scheduler: Any, attributes: Attributes) -> Settings:
    """Returns a copy of the present settings."""
    state = None if scheduler is None else capture(scheduler.state_dict())
    return Settings(groups=[capture(group) for group in optimizer.settings()], scheduler=state, attributes=attributes.read())


def write(settings: Settings, optimizer: ShardedOptimizer, scheduler: Any, attributes: Attributes) -> None:
    """Applies these settings to optimizer, scheduler and layers."""
    for group, values in zip(optimizer.optimizer.param_groups, settings.groups, strict=True):
        group.update(revive(values, group))
    if scheduler is not None:
        scheduler.load_state_dict(revive(settings.scheduler, scheduler.state_dict()))
    attributes.write({name: value for name, value in settings.attributes.items() if value is not ABSENT})


def difference(before: Settings, after: Settings) -> Change | None:
    """Returns the change from `before` to `after`, None if they are equal."""
    groups = tuple(
        (number, name, value)
        for number, (old, new) in enumerate(zip(before.groups, after.groups, strict=True))
        for name, value in new.items()
        if name not in old or not same(old[name], value)
    )
    scheduler = None if same(before.scheduler, after.scheduler) else after.scheduler
    attributes = {name: value for name, value in after.attributes.items() if not same(before.attributes.get(name, ABSENT), value)}
    if not groups and scheduler is None and not attributes:
        return None
    return Change(groups=groups, scheduler=scheduler, attributes=attributes)


def same(one: Any, other: Any) -> bool:
    """Returns whether two settings are equal (tensors by value, shape and dtype); NaN equals NaN."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, NestedObject):
        return one.kind == other.kind and same(one.state, other.state)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=True)
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) or (one != one and other != other)  # NaN


__all__ = ["Change", "Settings", "difference", "plain_or_none", "read", "same", "write"]
