"""Computes a parameter's initial value from what was recorded: the operations that it depends on, in their order, in real memory."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

from elastic.engine import randomness
from elastic.engine.deferred.recording import Operation, Ref, Tape
from elastic.errors import TrainerError
from elastic.memory import device
from elastic.memory.tensors import bytes_of, contiguous, part

_REMEDY = (
    "give it a value in the constructor (nn.init, torch.zeros, reset_parameters), or in weights=; or give the Trainer the model itself "
    "instead of a function, so that every worker builds it"
)


class Recipe:
    """The initial values of a model's parameters and buffers, by name.

    `places` has for each name the tensor on meta and the layer that it lies in.
    """

    def __init__(self, tape: Tape, places: Mapping[str, tuple[Ref, int]], seed: int) -> None:
        self._tape, self._places, self._seed = tape, places, seed
        self._writers: dict[int, list[int]] = defaultdict(list)
        self._origin: dict[int, int] = {}  # the operation that created a storage
        self._draws: dict[int, int] = {}  # which one of its storage's draws a random operation is
        drawn: dict[int, int] = defaultdict(int)
        for index, operation in enumerate(tape.operations):
            for _, ref in operation.creates:
                self._origin[ref.storage] = index
            for storage in sorted({*operation.writes, *(ref.storage for _, ref in operation.creates)}):
                self._writers[storage].append(index)
            if operation.random:
                self._draws[index] = drawn[_target(operation)]
                drawn[_target(operation)] += 1
        self._names = {ref.storage: (layer, name) for name, (ref, layer) in reversed(list(places.items()))}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def form(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Returns a tensor's shape and dtype."""
        ref, _ = self._places[name]
        return ref.shape, ref.dtype

    def value(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """Computes a tensor's initial value, on the host. Draws do not change the state of any generator.

        `into` is flat host memory of its size and dtype, in which the value is made if possible, so that it takes no other memory.

        Raises:
            TrainerError: if nothing gives some of its elements a value.
        """
        ref, layer = self._places[name]
        needed = self._needed(ref.storage)
        made = self._tape.operations
        if ref.storage not in self._origin:
            raise self._without(name, layer)
        blank = {r.storage for index in needed if made[index].blank for _, r in made[index].creates} & self._unfilled(needed)
        origin = made[self._origin[ref.storage]]
        bases: dict[int, tuple[torch.Tensor, int]] = {}
        if into is not None and origin.blank and origin.creates == ((0, ref),):
            bases[ref.storage] = into, int(into.storage_offset())
            needed.discard(self._origin[ref.storage])
            if ref.storage in blank and into.is_floating_point():
                into.fill_(torch.nan)
        with torch.no_grad(), randomness.kept():
            for index in sorted(needed):
                self._repeat(index, bases, blank, name)
            value = contiguous(_part(bases, ref))
            if blank and (not value.is_floating_point() or bool(torch.isnan(value.sum()))):
                raise self._without(name, layer)
        return value

    def digest(self, name: str) -> str:
        """Returns a digest of all that a tensor's initial value follows from, without computing it."""
        total = hashlib.sha256(f"{self._places[name]} {self._seed}".encode())
        for index in sorted(self._needed(self._places[name][0].storage)):
            operation = self._tape.operations[index]
            told = (operation.name, self._draws.get(index), tree_map(_told, (operation.args, operation.kwargs)))
            if operation.default != torch.float32:
                told = (*told, str(operation.default))
            total.update(repr(told).encode())
        return total.hexdigest()

    def _without(self, name: str, layer: int) -> TrainerError:
        return TrainerError(f"nothing gives {name} of layer {layer} its initial value, or not all of its elements: {_REMEDY}")

    def _needed(self, storage: int) -> set[int]:
        """Returns the operations that the last contents of a storage depend on."""
        made, found = self._tape.operations, set[int]()
        left = [(storage, len(made))]
        while left:
            storage, before = left.pop()
            wanted = []
            for index in reversed(self._writers[storage]):
                if index < before:
                    wanted.append(index)
                    if storage in made[index].overwrites and storage not in made[index].reads:
                        break  # nothing before matters but that there is memory
            for index in {*wanted, self._origin.get(storage, -1)} - found - {-1}:
                found.add(index)
                left += [(other, index) for other in made[index].reads if other != storage]
        return found

    def _unfilled(self, needed: set[int]) -> set[int]:
        """Returns the storages that are read, or are the result, with no operation before that writes all of them."""
        filled = {storage for index in needed for storage in self._tape.operations[index].overwrites}
        return {ref.storage for index in needed for _, ref in self._tape.operations[index].creates} - filled

    def _repeat(self, index: int, bases: dict[int, tuple[torch.Tensor, int]], blank: set[int], name: str) -> None:
        operation = self._tape.operations[index]

        def real(value: Any) -> Any:
            if isinstance(value, Ref):
                return _part(bases, value)
            return device.CPU if isinstance(value, torch.device) and value.type == "meta" else value

        if index in self._draws:
            torch.default_generator.set_state(randomness.torch_state(randomness.expand(*self._key(index))))
        with _default(operation.default):
            out = operation.call(*tree_map(real, operation.args), **tree_map(real, operation.kwargs))
        tensors = [each for each in tree_flatten(out)[0] if isinstance(each, torch.Tensor)]
        for number, ref in operation.creates:
            found = tensors[number]
            if (tuple(found.shape), found.stride(), found.dtype) != (ref.shape, ref.strides, ref.dtype):
                raise TrainerError(f"the initial value of {name} cannot be computed later: {operation.name} differs on meta. {_REMEDY}")
            if ref.storage in blank and found.is_floating_point():
                found.fill_(torch.nan)
            bases[ref.storage] = found, 0

    def _key(self, index: int) -> tuple[int | str, ...]:
        target = _target(self._tape.operations[index])
        layer, name = self._names.get(target, (-1, f"operation {index}"))
        return "initial", self._seed, layer, name, self._draws[index]


def _part(bases: Mapping[int, tuple[torch.Tensor, int]], ref: Ref) -> torch.Tensor:
    """Returns a tensor in real memory. A storage of the recording begins at an offset of the memory that a tensor lies in."""
    base, begins = bases[ref.storage]
    return part(base, ref.shape, ref.strides, begins + ref.offset)


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _target(operation: Operation) -> int:
    """Returns the storage that a random operation writes to."""
    return next(iter(sorted(operation.writes)), operation.creates[0][1].storage if operation.creates else -1)


def _told(value: Any) -> Any:
    if isinstance(value, Ref):
        return value.shape, value.strides, value.offset, str(value.dtype)
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), str(value.dtype), hashlib.sha256(bytes_of(contiguous(value)).data).hexdigest()
    return value if isinstance(value, bool | int | float | complex | str | None) else str(value)
