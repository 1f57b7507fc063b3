"""State at rest: between two updates nothing may write to the copies that a worker holds, so their digests must stay what they are.

Copies are digested when they are complete (an owned shard behind its update, a replica behind its replay, gathered parameters when they
have come), and again before the worker says that it is ready for the next step: so whoever has damaged memory finds that out by itself,
before anything that was computed with it counts. Each step takes layers in turn, so that it costs a hundredth of a step at most; where
that is enough for all layers, and at every comparison of replicas, it takes all. A spare has the digest of the shard it is a copy of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from elastic.layout.transfer import PARAM, Role
from elastic.memory.digest import checksum, digest
from elastic.memory.raw import as_bytes
from elastic.memory.tensors import HostBytes, bytes_of
from elastic.snapshot.held import Held, StoredCopy
from elastic.view import View

SHARE = 0.01
"""Of a step's time that the digests may take."""

LEAST_S = 3e-4
"""Seconds of each step that they may take in any case."""

_BYTES_PER_S = 5e9
_CALL_S = 3e-6

CopyKey = tuple[Role, int, int]
"""Which copy: its role, its layer and where its run starts."""


def combined(checksums: Mapping[str, str]) -> str:
    """One digest of a copy, of the checksums of its states."""
    parts = "".join(f"{state}{value}" for state, value in sorted(checksums.items()))
    return digest(as_bytes(parts.encode()))


def period(view: View, share: float = SHARE) -> int:
    """In how many steps every layer's turn comes: 1 if all are digested in each step. Every member finds the same."""
    workload, most = view.workload, 0.0
    for stage in view.plan.stages:
        layers = [workload.layers[layer] for layer in stage.layers]
        parameters = sum(layer.parameter_bytes for layer in layers)
        states = sum(workload.state_bytes_of(layer) for layer in stage.layers)
        owned = (parameters + states) / len(stage.members)
        copies = len(layers) * 8
        most = max(most, 2 * ((owned + parameters + (owned if len(view.members) > 1 else 0)) / _BYTES_PER_S + copies * _CALL_S))
    return max(1, math.ceil(most / max(LEAST_S, share * view.plan.step_s)))


_WHOSE: Mapping[Role, str] = {
    "live": "its own",
    "previous": "the spare of its own",
    "replica": "the replica of another worker's",
    "gathered": "the gathered",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """Memory of a copy that is not what it was when nothing has written to it."""

    role: Role
    layer: int
    start: int
    stop: int
    state: str
    step: int

    @property
    def key(self) -> CopyKey:
        return self.role, self.layer, self.start

    def __str__(self) -> str:
        return f"{_WHOSE[self.role]} {self.state} of layer {self.layer}, run [{self.start}, {self.stop}), as of step {self.step}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Resting:
    step: int
    stop: int
    memory: Mapping[str, HostBytes]
    checksums: Mapping[str, str]


class Rest:
    """What one worker knows of the contents of its copies in one view.

    `every` is the number of steps in which each layer has its turn; `all_of(step)` says of steps whether all have.
    """

    def __init__(self, every: int, all_of: Callable[[int], bool] = lambda step: False) -> None:
        self._every, self._all_of = every, all_of
        self._resting: dict[CopyKey, _Resting] = {}
        self._views: dict[CopyKey, Mapping[str, HostBytes]] = {}
        self.damaged: dict[CopyKey, Changed] = {}
        self.told: set[CopyKey] = set()  # the damaged copies that others know of

    def takes(self, step: int, layer: int) -> bool:
        """Whether copies of the layer as of this step are digested."""
        return (step + layer) % self._every == 0 or self._all_of(step)

    def note(self, role: Role, layer: int, start: int, step: int, memory: Mapping[str, torch.Tensor]) -> None:
        """The copy is complete; nothing writes to it until it is forgotten. Does nothing where it is not its layer's turn."""
        if not self.takes(step, layer):
            return
        raw = self._raw(role, layer, start, memory)
        checksums = {state: checksum(each.now()) for state, each in raw.items()}
        stop = start + next((each.numel() for each in memory.values()), 0)
        self._resting[role, layer, start] = _Resting(step=step, stop=stop, memory=raw, checksums=checksums)

    def _raw(self, role: Role, layer: int, start: int, memory: Mapping[str, torch.Tensor]) -> Mapping[str, HostBytes]:
        """As bytes. A copy lies in the same tensors as long as the view lasts, so that they are looked at once."""
        raw = self._views.get((role, layer, start), {})
        if raw.keys() != memory.keys() or any(raw[state].tensor is not each for state, each in memory.items()):
            raw = self._views[role, layer, start] = {state: HostBytes(each) for state, each in memory.items()}
        return raw

    def forget(self, *roles: Role) -> None:
        """Copies of these roles are about to be written to."""
        self._resting = {key: resting for key, resting in self._resting.items() if key[0] not in roles}

    def spared(self, previous_copies: Iterable[Held]) -> None:
        """These are copies of the shards that are owned: they must have the same contents."""
        self.forget("previous")
        for previous in previous_copies:
            owned = self._resting.get(("live", previous.layer, previous.start))
            if owned is not None and owned.step == previous.step:
                raw = self._raw("previous", previous.layer, previous.start, previous.memory)
                memory = {state: raw[state] for state in owned.memory}
                self._resting["previous", previous.layer, previous.start] = replace(owned, memory=memory)

    def check(self, roles: Collection[Role] = ("live", "gathered", "replica")) -> list[Changed]:
        """Looks at copies of these roles again: those that have changed, which are `damaged` from here on."""
        found = []
        for (role, layer, start), resting in self._resting.items():
            if role not in roles:
                continue
            for state, memory in resting.memory.items():
                if checksum(memory.now()) != resting.checksums[state]:
                    where = {"layer": layer, "start": start, "stop": resting.stop, "state": state, "step": resting.step}
                    found.append(Changed(role=role, **where))
        for changed in found:
            self._resting.pop(changed.key, None)
            self.damaged[changed.key] = changed
        return found

    def digest_of(self, role: Role, layer: int, start: int, step: int) -> str | None:
        """One digest of a copy and all of its states, if it is known."""
        resting = self._resting.get((role, layer, start))
        return combined(resting.checksums) if resting is not None and resting.step == step else None

    def given(self, copies: Iterable[StoredCopy]) -> list[StoredCopy]:
        """What may be given of these copies, with their digests where they are known; nothing that is damaged."""
        found: list[StoredCopy] = []
        for copy in copies:
            if self._is_damaged(copy):
                continue
            if isinstance(copy, Held) and copy.role != "gathered":
                copy = replace(copy, digest=self.digest_of(copy.role, copy.layer, copy.start, copy.step))
            found.append(copy)
        return found

    def _is_damaged(self, copy: StoredCopy) -> bool:
        if copy.role == "gathered":  # a whole layer, with what is owned of it; or a parameter of another layer
            return any(
                layer == copy.layer and start < copy.stop and changed.stop > copy.start
                for (role, layer, start), changed in self.damaged.items()
                if role == "gathered" or (role == "live" and changed.state == PARAM)
            )
        return (copy.role, copy.layer, copy.start) in self.damaged


def intact(copy: StoredCopy) -> bool:
    """Whether a copy that was kept for long has the contents still that it had; one whose digest is not known is held to have."""
    if not isinstance(copy, Held) or copy.digest is None:
        return True
    return combined({state: checksum(bytes_of(memory)) for state, memory in copy.memory.items()}) == copy.digest
