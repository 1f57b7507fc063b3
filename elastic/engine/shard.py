"""Shards: all state of one interval as flat memory, and the optimizer that works on some of them through views."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from elastic.engine.after_step import PREFIX, AfterStep, AfterStepState
from elastic.engine.reduction import Parts
from elastic.layout.layout import Interval
from elastic.layout.regions import MASTER, PARAM, ModelSpec, ParameterSpec
from elastic.memory.tensors import copy, lasting
from elastic.recovery.inventory import Scalars

GradientScale = Callable[[torch.Tensor], Any]
"""Changes a sum of gradients, in place, to the gradient of the mean loss, clipped."""


def unscaled(gradient: torch.Tensor) -> None:
    """Leaves it as it is."""


RUN = "run"
"""Stands among scalars for a state that has the shape of its parameter: its values are in the shard's memory."""


def in_memory(value: Any) -> bool:
    """Whether what stands among scalars is `RUN`. Tensors are not compared with it."""
    return isinstance(value, str) and value == RUN


@dataclass(slots=True, kw_only=True)
class Shard:
    """One interval's parameters and optimizer states: `memory[state]` has one element per element of the interval, padding included.

    With masters the optimizer works on `memory[MASTER]`, which is float32, and `memory[PARAM]` is its rounding.
    `scalars` is all other optimizer state when the shard is made; once an optimizer is bound to it, that state lives in the optimizer.
    """

    layer: int
    interval: Interval
    memory: dict[str, torch.Tensor]
    scalars: Scalars = field(default_factory=dict)
    pieces: list[nn.Parameter | None] = field(default_factory=list)

    @property
    def worked(self) -> torch.Tensor:
        """The memory that the optimizer updates: masters, or else the parameters themselves."""
        return self.memory.get(MASTER, self.memory[PARAM])

    def raise_masters(self) -> None:
        """Gives masters the values of the parameters, before the first step."""
        if MASTER in self.memory:
            self.memory[MASTER].copy_(self.memory[PARAM])

    def parameters(self, spec: ModelSpec) -> list[tuple[ParameterSpec, int, int]]:
        """Every parameter that the interval touches, and the run of it inside, relative to the interval."""
        first, last = self.interval.start, self.interval.stop
        hits = [p for p in spec.layers[self.layer].parameters if p.start < last and p.stop > first]
        return [(p, max(p.start, first) - first, min(p.stop, last) - first) for p in hits]


@dataclass(slots=True, eq=False)
class _Piece:
    """The run `[start, stop)` of a shard, which is a piece of the parameter called `name`, or all of it.

    `lying` has the optimizer's states that were found in the shard's memory, by name there, each with its address. `master`: the parameter
    that the optimizer has is a master.
    """

    parameter: nn.Parameter
    name: str
    start: int
    stop: int
    master: bool
    lying: dict[str, tuple[torch.Tensor, int]] = field(default_factory=dict)

    def lies(self, name: str, value: Any) -> bool:
        """Returns whether a state is one that was found in the shard's memory."""
        known = self.lying.get(name)
        return known is not None and known[0] is value and value.data_ptr() == known[1]


class Updater:
    """An optimizer instance whose groups hold the pieces of shards, one per parameter and shard.

    Behind each update the functions `after` are given every piece, and a state of its own.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        spec: ModelSpec,
        group_of: Mapping[str, int],
        *,
        writes_gradients: bool = False,
        after: Sequence[AfterStep] = (),
        devices: Mapping[str, torch.device] = MappingProxyType({}),
    ) -> None:
        """`devices` says where the optimizer keeps each tensor that does not have its parameter's shape, by the state's name."""
        self.optimizer, self._devices = optimizer, devices
        self._after, self._kept = after, dict[nn.Parameter, AfterStepState]()
        self._writes_gradients = writes_gradients
        self._spec, self._group_of = spec, group_of
        self.still = spec.frozen
        self.shards: dict[tuple[int, int], Shard] = {}
        self._pieces: dict[tuple[int, int], list[_Piece]] = {}  # those that the optimizer updates
        self._scalars: dict[tuple[int, int], Scalars] = {}  # as of the last update, of shards that were asked for
        self._numbers: dict[tuple[torch.dtype, Any], torch.Tensor] = {}  # in them, by value
        self._alike: dict[tuple[Any, ...], dict[str, Any]] = {}  # the scalars of parameters that have equal ones

    def bind(self, shards: Sequence[Shard]) -> None:
        """Lets go of earlier shards and works on these from here on, in place."""
        self._pieces.clear()
        for group in self.optimizer.param_groups:
            group["params"] = []
        self.optimizer.state.clear()
        self._kept.clear()
        self._forget_scalars()
        self.shards = {(shard.layer, shard.interval.start): shard for shard in shards}
        for key, shard in self.shards.items():
            runs = shard.parameters(self._spec)
            shard.pieces = [self._piece(shard, *run) for run in runs]
            pairs = zip(shard.pieces, runs, strict=True)
            masters = MASTER in shard.memory
            self._pieces[key] = [_Piece(piece, p.name, start, stop, masters) for piece, (p, start, stop) in pairs if piece is not None]

    def _piece(self, shard: Shard, parameter: ParameterSpec, start: int, stop: int) -> nn.Parameter | None:
        number = self._group_of.get(parameter.name)
        if number is None:
            return None  # not given to the optimizer: never updated, as in torch
        shape = parameter.shape if self._spec.cut == "tensor" else (stop - start,)
        piece = nn.Parameter(shard.worked[start:stop].view(shape))
        self.optimizer.param_groups[number]["params"].append(piece)
        scalars = shard.scalars.get(parameter.name, {})
        state = {
            name: shard.memory[name][start:stop].view(shape) if in_memory(value) else self._own(name, value)
            for name, value in scalars.items()
            if name != MASTER
        }
        kept = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
        self._kept[piece] = AfterStepState(parameter.name, kept)
        if own := {name: value for name, value in state.items() if not name.startswith(PREFIX)}:
            self.optimizer.state[piece] = own
        return piece

    def _own(self, name: str, value: Any) -> Any:
        """Returns the value, or a copy of a tensor where the optimizer keeps it: copies that have moved between workers are on the host."""
        place = self._devices.get(name)
        return value.to(place) if isinstance(value, torch.Tensor) and place not in (None, value.device) else copied(value)

    def step(self, gradients: Mapping[tuple[int, int], Parts], scale: GradientScale = unscaled, *, skipped: bool = False) -> None:
        """Updates the shards that gradients (one per run of a parameter, None where absent) are given for, and no other.

        Gradients of parameters with masters are sums, which become gradients by `scale`, in float32.
        Nothing is done behind a step that is `skipped`: it changes nothing.
        Gradients stay as they are: they are sent, and may be needed again.
        """
        self._forget_scalars()
        for key, parts in gradients.items():
            for piece, part in zip(self.shards[key].pieces, parts, strict=True):
                if piece is not None:
                    piece.grad = None if part is None else self._gradient(part, piece, scale).view(piece.shape)
        self.optimizer.step()
        if self._after and not skipped:
            with torch.no_grad():
                for piece in [piece for key in gradients for piece in self.shards[key].pieces if piece is not None]:
                    for f in self._after:
                        f(piece, self._kept[piece])
        for key in gradients:
            for piece in self.shards[key].pieces:
                if piece is not None:
                    piece.grad = None
            self._settle(self.shards[key], self._pieces[key])
            self._round(self.shards[key], self._pieces[key])

    def _gradient(self, part: torch.Tensor, piece: nn.Parameter, scale: GradientScale) -> torch.Tensor:
        if part.dtype == piece.dtype:
            return copy(part) if self._writes_gradients else part
        gradient = part.to(piece.dtype)
        scale(gradient)
        return gradient

    @staticmethod
    def _round(shard: Shard, pieces: Sequence[_Piece]) -> None:
        """Makes parameters the roundings of their masters."""
        for piece in pieces if MASTER in shard.memory else ():
            shard.memory[PARAM][piece.start : piece.stop].copy_(piece.parameter.detach().reshape(-1))

    def _forget_scalars(self) -> None:
        self._scalars.clear()
        self._numbers.clear()
        self._alike.clear()

    def _states(self, piece: _Piece) -> Iterator[tuple[str, Any]]:
        """Yields all state of a piece, by the names in its shard's memory."""
        if piece.master:
            yield MASTER, piece.parameter.detach()
        yield from self.optimizer.state.get(piece.parameter, {}).items()
        for name, value in self._kept[piece.parameter].items():
            yield PREFIX + name, value

    def _settle(self, shard: Shard, pieces: Sequence[_Piece]) -> None:
        """Moves state that the optimizer has made anew into the shard's memory, where it stays from then on."""
        for piece in pieces:
            for prefix, state in (("", self.optimizer.state.get(piece.parameter, {})), (PREFIX, self._kept[piece.parameter])):
                for name, value in state.items():
                    full = prefix + name if prefix else name
                    if piece.lies(full, value) or not _is_run(value, piece.parameter):
                        continue
                    if not _lies_in(value, shard.memory.get(full), piece.start):
                        value = state[name] = self._moved(shard, full, value, piece.start, piece.stop).view(piece.parameter.shape)
                    piece.lying[full] = value, value.data_ptr()

    def _moved(self, shard: Shard, name: str, value: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        memory = shard.memory.get(name)
        if memory is None:
            memory = shard.memory[name] = lasting(shard.interval.elements, value.dtype)
        return memory[start:stop].copy_(value.detach().reshape(-1))

    def scalars(self, shard: Shard) -> Scalars:
        """The shard's state besides its memory, as it is now: copies, which callers must not change."""
        known = self._scalars.get((shard.layer, shard.interval.start))
        if known is None:
            pieces = self._pieces[shard.layer, shard.interval.start]
            found = ((piece.name, self._copied_scalars(piece)) for piece in pieces)
            known = self._scalars[shard.layer, shard.interval.start] = {name: values for name, values in found if values}
        return known

    def changed_scalars(self, shard: Shard) -> Iterator[tuple[str, str, Any, Any]]:
        """Yields scalars that have changed since `scalars` was first called after the last update: parameter, state, and both values."""
        known = self._scalars.get((shard.layer, shard.interval.start), {})
        for piece in self._pieces[shard.layer, shard.interval.start]:
            if piece.name not in known:
                continue
            now = self.optimizer.state.get(piece.parameter, {})
            for name, before in known[piece.name].items():
                if not name.startswith(PREFIX) and not in_memory(before) and not _equal(now.get(name), before):
                    yield piece.name, name, before, now.get(name)

    def _copied_scalars(self, piece: _Piece) -> dict[str, Any]:
        """Returns a piece's state besides its memory: the same dict for all pieces with equal state since the last update."""
        copies = {
            name: RUN if name == MASTER or piece.lies(name, value) or _is_run(value, piece.parameter) else self._copied(value)
            for name, value in self._states(piece)
        }
        return self._alike.setdefault(tuple((name, id(value)) for name, value in copies.items()), copies)

    def _copied(self, value: Any) -> Any:
        """Returns the value, or a copy of a tensor; one for all equal numbers since the last update, since most count the same steps."""
        if not isinstance(value, torch.Tensor) or value.ndim or not (number := value.item()):  # 0 equals -0
            return copied(value)
        key = value.dtype, number
        if key not in self._numbers:
            self._numbers[key] = copied(value)
        return self._numbers[key]


def _equal(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return one is other or one == other
    return one.item() == other.item() if one.numel() == other.numel() == 1 else torch.equal(one, other)


def _is_run(value: Any, piece: nn.Parameter) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape == piece.shape


def _lies_in(value: torch.Tensor, memory: torch.Tensor | None, start: int) -> bool:
    return memory is not None and value.data_ptr() == memory.data_ptr() + start * memory.element_size()


def copied(value: Any) -> Any:
    """The value itself, or a copy of a tensor, which optimizers change in place."""
    return copy(value) if isinstance(value, torch.Tensor) else value
