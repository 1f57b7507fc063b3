"""State at rest: between two updates nothing may write to the copies that a worker holds, so their digests must not change.

A copy is digested when it is complete (an owned shard after its update, a replica after its replay, gathered parameters when they have
arrived), and again before the worker sends READY for the next step. So a worker with damaged memory detects it itself, before a result
computed with it counts. Steps digest layers in turn, to cost at most 1 % of a step's time; if that suffices for all layers, and at every
comparison of replicas, a step digests all. A previous copy has the digest of the shard that it is a copy of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from elastic.layout.transfer import PARAM, Role
from elastic.memory import device
from elastic.memory.digest import checksum_of, digest
from elastic.memory.raw import as_bytes, checksum
from elastic.memory.tensors import HostBytes
from elastic.snapshot.held_copies import Held, StoredCopy
from elastic.view import View

SHARE = 0.01
"""Fraction of a step's time that the digests may take."""

LEAST_S = 3e-4
"""Seconds that they may take in any step."""

COMPARED_EVERY = 50
"""Steps: all layers are digested in one of so many."""

KEPT_EVERY = 10
"""Steps: if all layers are digested in each step, a copy is kept in one of so many."""

_BYTES_PER_S = 5e9
_CALL_S = 3e-6

CopyKey = tuple[Role, int, int]
"""Identifies a copy: its role, its layer and the start of its run."""


def combined(checksums: Mapping[str, str]) -> str:
    """Returns one digest of a copy, from the checksums of its states."""
    parts = "".join(f"{state}{value}" for state, value in sorted(checksums.items()))
    return digest(as_bytes(parts.encode()))


def period(view: View, share: float = SHARE) -> int:
    """Returns in how many steps each layer is digested once: 1 if all are digested in each step. It is equal on all members."""
    workload, most = view.workload, 0.0
    for stage in view.plan.stages:
        layers = [workload.layers[layer] for layer in stage.layers]
        parameters = sum(layer.parameter_bytes for layer in layers)
        states = sum(workload.state_bytes_of(layer) for layer in stage.layers)
        owned = (parameters + states) / len(stage.members)
        copies = len(layers) * 8
        most = max(most, 2 * ((owned + parameters + owned * view.fleet.replicas) / _BYTES_PER_S + copies * _CALL_S))
    return max(1, math.ceil(most / max(LEAST_S, share * view.plan.step_s)))


def compared(step: int) -> bool:
    """Returns whether all layers are digested as of this step."""
    return step % COMPARED_EVERY == 0


WHOSE: Mapping[Role, str] = {
    "live": "its own",
    "previous": "the previous copy of its own",
    "replica": "the replica of another worker's",
    "previous replica": "the previous copy of the replica of another worker's",
    "gathered": "the gathered",
    "kept": "the kept copy of its own",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """A state of a copy whose memory changed although nothing should have written to it."""

    role: Role
    layer: int
    start: int
    stop: int
    state: str
    step: int
    digests: tuple[str, str] = ("", "")  # when it was complete, and now

    @property
    def key(self) -> CopyKey:
        return self.role, self.layer, self.start

    def __str__(self) -> str:
        return f"{WHOSE[self.role]} {self.state} of layer {self.layer}, run [{self.start}, {self.stop}), as of step {self.step}"

    @property
    def copy(self) -> str:
        """Says in words whose copy it is."""
        return WHOSE[self.role]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Resting:
    step: int
    stop: int
    memory: Mapping[str, HostBytes]
    checksums: Mapping[str, str]
    together: str = ""  # the checksums, in the order of states


class Rest:
    """The digests of one worker's copies in one view.

    `every` is the number of steps in which each layer is digested once; `all_of(step)` returns whether a step digests all layers.
    `owned_always`: every step digests and checks all owned shards, since nobody else has a copy of them. Layers in `still` are not trained:
    they are digested once, and checked when a recovery needs them.
    """

    def __init__(
        self, every: int, all_of: Callable[[int], bool] = compared, *, owned_always: bool = False, still: Collection[int] = ()
    ) -> None:
        self._every, self._all_of, self._owned_always, self._still = every, all_of, owned_always, still
        self._resting: dict[CopyKey, _Resting] = {}
        self._views: dict[CopyKey, Mapping[str, HostBytes]] = {}
        self.damaged: dict[CopyKey, Changed] = {}
        self.told: set[CopyKey] = set()  # the damaged copies that were reported

    def takes(self, step: int, layer: int) -> bool:
        """Returns whether copies of the layer as of this step are digested."""
        return (step + layer) % self._every == 0 or self._all_of(step)

    def keeps(self, step: int) -> bool:
        """Returns whether all layers are digested as of this step, and a copy of it is to be kept."""
        return self._all_of(step) or (self._every == 1 and step % KEPT_EVERY == 0)

    def turn_before(self, step: int, layer: int) -> int:
        """Returns the newest step before `step` as of which copies of the layer were digested."""
        return next((earlier for earlier in range(step - 1, step - 1 - COMPARED_EVERY, -1) if self.takes(earlier, layer)), -1)

    def _due(self, role: Role, step: int, layer: int) -> bool:
        return self.takes(step, layer) or (role == "live" and self._owned_always)

    def note(self, role: Role, layer: int, start: int, step: int, memory: Mapping[str, torch.Tensor], before: Rest | None = None) -> None:
        """Digests a complete copy, which must not be written to until `forget`. Does nothing if it is not the layer's turn.

        If the view `before` has digested the same memory as of the same step, that digest is taken.
        """
        if layer not in self._still and not self._due(role, step, layer):
            return
        raw = self._raw(role, layer, start, memory)
        own = self._resting.get((role, layer, start))
        if layer in self._still and own is not None and _same(own.memory, raw):
            self._resting[role, layer, start] = replace(own, step=step)
            return
        known = None if before is None else before._resting.get((role, layer, start))
        if known is not None and (known.step == step or layer in self._still) and _same(known.memory, raw):
            self._resting[role, layer, start] = replace(known, step=step)
            return
        checksums = {state: _checksum(each) for state, each in raw.items()}
        stop = start + next((each.numel() for each in memory.values()), 0)
        together = "".join(value for _, value in sorted(checksums.items()))
        self._resting[role, layer, start] = _Resting(step=step, stop=stop, memory=raw, checksums=checksums, together=together)

    def _raw(self, role: Role, layer: int, start: int, memory: Mapping[str, torch.Tensor]) -> Mapping[str, HostBytes]:
        """Returns the memory as bytes. A copy lies in the same tensors as long as the view lasts, so the result is cached."""
        raw = self._views.get((role, layer, start), {})
        if raw.keys() != memory.keys() or any(raw[state].tensor is not each for state, each in memory.items()):
            raw = self._views[role, layer, start] = {state: HostBytes(each) for state, each in memory.items()}
        return raw

    def forget(self, *roles: Role) -> None:
        """Forgets the digests of copies of these roles, which are about to be written to."""
        self._resting = {key: each for key, each in self._resting.items() if key[0] not in roles or key[1] in self._still}

    def release(self) -> None:
        """Lets go of all memory."""
        self._resting, self._views = {}, {}

    def spared(self, previous_copies: Iterable[Held], origin: Role = "live", role: Role = "previous") -> None:
        """Notes previous copies with the digests of the shards, or replicas, that they were copied from."""
        self.forget(role)
        for previous in previous_copies:
            source = self._resting.get((origin, previous.layer, previous.start))
            if previous.layer in self._still:
                continue  # it is the shard's own memory
            if source is not None and source.step == previous.step:
                raw = self._raw(role, previous.layer, previous.start, previous.memory)
                memory = {state: raw[state] for state in source.memory}
                self._resting[role, previous.layer, previous.start] = replace(source, memory=memory)

    def check(self, roles: Collection[Role] = ("live", "gathered", "replica"), *, in_turn: bool = True) -> list[Changed]:
        """Digests copies of these roles again; returns those that have changed, and adds them to `damaged`.

        `in_turn`: only those of layers whose turn it was when they were complete.
        """
        found = []
        for (role, layer, start), resting in self._resting.items():
            if role not in roles or (in_turn and (layer in self._still or not self._due(role, resting.step, layer))):
                continue
            for state, memory in resting.memory.items():
                was, now = resting.checksums[state], _checksum(memory)
                if was != now:
                    where = {"layer": layer, "start": start, "stop": resting.stop, "state": state, "step": resting.step}
                    found.append(Changed(role=role, digests=(was, now), **where))
        for changed in found:
            self._resting.pop(changed.key, None)
            self.damaged[changed.key] = changed
        return found

    def give_up(self, changed: Changed) -> None:
        """Notes that a copy is wrong by what other workers have."""
        self._resting.pop(changed.key, None)
        self.damaged[changed.key] = changed

    def blocks(self, role: Role, layer: int, start: int, state: str, elements: int) -> list[str]:
        """Returns the checksums of the blocks of so many elements of a copy's state; none if the copy is not known."""
        resting = self._resting.get((role, layer, start))
        memory = None if resting is None else resting.memory.get(state)
        if memory is None:
            return []
        return [checksum_of(block) for block in memory.tensor.split(elements)] if memory.tensor.numel() else []

    def combined(self, role: Role, step: int, places: Iterable[tuple[int, int]], *, parameters: bool) -> str | None:
        """Returns one digest of the copies at these layers and starts, as far as it was their turn: of `parameters` only, or of all states.

        Returns None if there are none, or the digest of one is unknown.
        """
        parts: list[str] = []
        for layer, start in places:
            if self._every > 1 and not self.takes(step, layer):
                continue
            resting = self._resting.get((role, layer, start))
            if resting is None or resting.step != step:
                return None
            parts.append(resting.checksums[PARAM] if parameters else resting.together)
        return checksum(as_bytes("".join(parts).encode())) if parts else None

    def digest_of(self, role: Role, layer: int, start: int, step: int) -> str | None:
        """Returns one digest of all states of a copy, None if it is unknown."""
        resting = self._resting.get((role, layer, start))
        return combined(resting.checksums) if resting is not None and resting.step == step else None

    def checksums_of(self, role: Role, step: int) -> dict[tuple[int, int], Mapping[str, str]]:
        """Returns the known digests of the states of copies of a role as of a step, by layer and first element."""
        resting = ((key, each) for key, each in self._resting.items() if key[0] == role and each.step == step)
        return {(layer, start): each.checksums for (_, layer, start), each in resting}

    def given(self, copies: Iterable[StoredCopy]) -> list[StoredCopy]:
        """Returns these copies without the damaged ones, with their digests where they are known."""
        found: list[StoredCopy] = []
        for copy in copies:
            if self._is_damaged(copy):
                continue
            if isinstance(copy, Held) and copy.role not in ("gathered", "kept"):
                copy = replace(copy, digest=self.digest_of(copy.role, copy.layer, copy.start, copy.step))
            found.append(copy)
        return found

    def unchanged(self, copies: Sequence[Held]) -> bool:
        """Returns whether the digests of all these copies are known, and still right."""
        given = self.given(copies)
        known = all(isinstance(copy, Held) and (copy.digest is not None or copy.layer in self._still) for copy in given)
        return known and len(given) == len(copies) and all(map(intact, given))

    def _is_damaged(self, copy: StoredCopy) -> bool:
        if copy.layer in self._still and device.on_host():  # its copies of all steps lie in the same memory
            role = {"previous": "live", "kept": "live", "previous replica": "replica"}.get(copy.role)
            if (role, copy.layer, copy.start) in self.damaged:
                return True
        if copy.role == "gathered":  # a whole layer, its owned runs included; or a tied parameter of another layer
            return any(
                layer == copy.layer and start < copy.stop and changed.stop > copy.start
                for (role, layer, start), changed in self.damaged.items()
                if role == "gathered" or (role == "live" and changed.state == PARAM)
            )
        return (copy.role, copy.layer, copy.start) in self.damaged


def _checksum(memory: HostBytes) -> str:
    return checksum(memory.now()) if device.on_host() else checksum_of(memory.tensor)


def _same(one: Mapping[str, HostBytes], other: Mapping[str, HostBytes]) -> bool:
    return one.keys() == other.keys() and all(each.tensor is other[state].tensor for state, each in one.items())


def intact(copy: StoredCopy) -> bool:
    """Returns whether a copy's contents still have its digest; True if the digest is unknown."""
    if not isinstance(copy, Held) or copy.digest is None:
        return True
    return combined({state: checksum_of(memory) for state, memory in copy.memory.items()}) == copy.digest
