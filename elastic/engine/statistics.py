"""Running statistics of BatchNorm that do not depend on which worker runs which micro-batch.

A forward does not change the running buffers. Hooks replace them by temporary ones during the call, and record the mean and variance of the
micro-batch. Workers send these records with READY and APPLY. At the end of the step every worker applies the records of all layers, in
the order of micro-batches and, inside one, of calls. Plain torch, which runs micro-batches one after another, does the same. Recomputation
in backward and evaluation record nothing.

The bits equal torch's. Its CPU kernels (2.x) round differently by the memory format of the input. If the input is contiguous (or channels
last), momentum and products have the buffers' dtype; for input of that dtype the variance is added in float64. For any other format,
everything is in float64, and the variance has more bits than the buffer can hold. The hook computes these bits in a second pass over the
input. (A third pass would give the last five bits.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from elastic.errors import TrainerError
from elastic.memory import device
from elastic.memory.tensors import of_array, values_of, zeros_like

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")

_STRIDED, _WIDE, _NARROW = range(3)

Arrays = Mapping[str, np.ndarray]

LayerCall = tuple[int, int]
"""A micro-batch and a layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Float64 `mean` and unbiased `variance` of each channel in one call of one module. `way`: how torch's kernel would apply them."""

    module: int
    way: int
    mean: np.ndarray
    variance: np.ndarray


Records = Mapping[LayerCall, Sequence[Record]]
"""The records of the calls, in order, for every forward of a layer with such modules."""


@dataclass(slots=True, kw_only=True)
class _Call:
    """A module's own buffers and momentum, which the hooks have replaced until its forward returns."""

    own: dict[str, torch.Tensor | None]
    momentum: float | None


@dataclass(slots=True, kw_only=True)
class _Recording:
    kept: bool  # False for a recomputation in backward
    records: list[Record] = field(default_factory=list)


def tracks(module: nn.Module) -> bool:
    """Returns whether the module keeps running statistics that `Statistics` applies."""
    return isinstance(module, _BatchNorm) and bool(module.track_running_stats) and module.running_mean is not None


class Statistics:
    """Records and applies the statistics of all such modules of a model, in the order of their names under `root`."""

    def __init__(self, root: nn.Module, layers: Sequence[nn.Module]) -> None:
        self.layers = frozenset(index for index, layer in enumerate(layers) if any(map(tracks, layer.modules())))
        found = {name: module for name, module in root.named_modules() if tracks(module)}
        self.names = tuple(sorted(found))
        self.modules: tuple[Any, ...] = tuple(found[name] for name in self.names)
        self._numbers = {id(module): number for number, module in enumerate(self.modules)}
        self._recording: _Recording | None = None
        self._calls: list[_Call] = []
        self._found: dict[LayerCall, Sequence[Record]] = {}

    @property
    def buffers(self) -> list[str]:
        """The names of the buffers that these modules change."""
        pairs = zip(self.names, self.modules, strict=True)
        present = [(name, buffer) for name, module in pairs for buffer in BUFFERS if module._buffers.get(buffer) is not None]
        return [f"{name}.{buffer}" if name else buffer for name, buffer in present]

    def watch(self) -> None:
        """Registers hooks on the modules; they do nothing outside of `during`."""
        enter, leave = self._enter, self._leave  # in lambdas, since deepcopy of a module would copy the object of a bound method too
        for module in self.modules:
            module.register_forward_pre_hook(lambda module, args: enter(module))
            module.register_forward_hook(lambda module, args, output: leave(module, args), always_call=True)

    @contextmanager
    def during(self, layer: int, micro_batch: int | None) -> Iterator[None]:
        """Records the forward of a layer that runs inside the block; keeps nothing if `micro_batch` is None."""
        if layer not in self.layers:
            yield
            return
        self._recording = _Recording(kept=micro_batch is not None)
        try:
            yield
            if micro_batch is not None:
                self._found[micro_batch, layer] = tuple(self._recording.records)
        finally:
            self._recording = None

    @contextmanager
    def unkept(self) -> Iterator[None]:
        """Keeps nothing of forwards inside the block, which may lie inside of a `during`, and leaves running buffers as they are."""
        before, self._recording = self._recording, _Recording(kept=False)
        try:
            yield
        finally:
            self._recording = before

    def begin(self, known: Records | None = None) -> None:
        """Starts a step: keeps only the records in `known`, which were salvaged when the step was aborted."""
        self._found = dict(known or {})

    def of(self, micro_batches: Iterable[int], layers: Iterable[int]) -> Records:
        """Returns the records of these micro-batches and layers."""
        wanted, held = set(micro_batches), set(layers)
        return {place: found for place, found in self._found.items() if place[0] in wanted and place[1] in held}

    def _enter(self, module: Any) -> None:
        if self._recording is None or id(module) not in self._numbers or not (module.training and module.track_running_stats):
            return
        own = {name: module._buffers.get(name) for name in BUFFERS}
        self._calls.append(_Call(own=own, momentum=module.momentum))
        for name, buffer in own.items():
            if buffer is not None:
                module._buffers[name] = zeros_like(buffer)
        module.momentum = 1.0  # so that the buffers become the statistics of this micro-batch alone

    def _leave(self, module: Any, args: Sequence[Any]) -> None:
        if self._recording is None or id(module) not in self._numbers or not (module.training and module.track_running_stats):
            return
        call = self._calls.pop()
        mean, variance = module._buffers["running_mean"], module._buffers["running_var"]
        module._buffers.update(call.own)
        module.momentum = call.momentum
        if not self._recording.kept or not args:
            return
        x = args[0].detach()
        way = _way(x, variance.dtype)
        exact = variance.double()
        if way == _STRIDED:
            exact = exact + 2.0 * _beyond(x, mean, variance).double()
        number = self._numbers[id(module)]
        self._recording.records.append(Record(module=number, way=way, mean=values_of(mean.double()), variance=values_of(exact)))

    def encode(self, found: Records) -> dict[str, np.ndarray]:
        """Returns the records as arrays for a message."""
        places = sorted(found)
        index = [[*place, record.module, record.way] for place in places for record in found[place]]
        values = [each for place in places for record in found[place] for each in (record.mean, record.variance)]
        return {
            "statistics_at": np.array(places, dtype=np.int64).reshape(-1, 2),
            "statistics_of": np.array(index, dtype=np.int64).reshape(-1, 4),
            "statistics": np.concatenate(values) if values else np.array([]),
        }

    def decode(self, arrays: Arrays) -> dict[LayerCall, list[Record]]:
        """Returns the records of a message; the inverse of `encode`."""
        found: dict[LayerCall, list[Record]] = {(micro_batch, layer): [] for micro_batch, layer in arrays["statistics_at"].tolist()}
        position = 0
        for micro_batch, layer, module, way in arrays["statistics_of"].tolist():
            channels = self.modules[module].running_mean.numel()
            mean, variance = arrays["statistics"][position : position + 2 * channels].reshape(2, channels)
            position += 2 * channels
            found[micro_batch, layer].append(Record(module=module, way=way, mean=mean, variance=variance))
        return found

    def merged(self, all_found: Iterable[Records], micro_batches: int) -> Records:
        """Returns the records of all members. Raises TrainerError unless they cover every micro-batch of every layer exactly."""
        found = {place: records for each in all_found for place, records in each.items()}
        wanted = {(micro_batch, layer) for micro_batch in range(micro_batches) for layer in self.layers}
        if found.keys() != wanted:
            strange = sorted(wanted ^ found.keys())
            raise TrainerError(f"BatchNorm statistics of (micro-batch, layer) {strange} are missing or belong to another step")
        return found

    def apply(self, found: Records) -> None:
        """Updates the running buffers by all records of a step."""
        with torch.no_grad():
            for place in sorted(found):
                for record in found[place]:
                    _update(self.modules[record.module], record)


def _way(x: torch.Tensor, buffers: torch.dtype) -> int:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if not (x.is_contiguous() or (x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()]))):
        return _STRIDED
    return _WIDE if x.dtype == buffers else _NARROW


def _beyond(x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Returns half the rounding error of `variance`: (exact - rounded) / 2."""
    rest, unused = -variance, -mean
    with torch.no_grad():
        torch.batch_norm_update_stats(x, unused, rest, 0.5)
    return rest


def _update(module: Any, record: Record) -> None:
    tracked, momentum = module.num_batches_tracked, module.momentum
    if tracked is not None:
        tracked.add_(1)
        momentum = 1.0 / float(tracked) if momentum is None else momentum
    elif momentum is None:
        momentum = 0.0
    mean, variance = (device.placed(of_array(each.copy())) for each in (record.mean, record.variance))
    before, spread = module.running_mean, module.running_var
    if record.way != _STRIDED:
        factor = torch.tensor(momentum, dtype=before.dtype)
        rest = 1 - factor
        before.copy_(factor * mean.to(before.dtype) + rest * before)
        if record.way == _WIDE:
            spread.copy_(factor.double() * variance + (rest * spread).double())
        else:
            spread.copy_(factor * variance.to(spread.dtype) + rest * spread)
    else:
        before.copy_(momentum * mean + (1 - momentum) * before.double())
        spread.copy_(momentum * variance + (1 - momentum) * spread.double())
