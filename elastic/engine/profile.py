"""Measures the cost of each layer once, on the real model, in CPU time of this thread, which other processes affect little."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from elastic.engine.boundary import Crossing
from elastic.engine.data import model_input
from elastic.engine.flops import FlopCount, eager, flops_of, may_compile
from elastic.engine.model import LayeredModel
from elastic.engine.numerics import Numerics
from elastic.engine.randomness import Generators
from elastic.engine.stage import Gradients, LayerRun, LayerRunner, Loss, LossRunner, enter
from elastic.memory.tensors import copy

LayerProfile = list[list[float]]

Clock = Callable[[], float]

MOST_PASSES, ENOUGH_S = 8, 0.03

WORTH_SPLITTING = 0.1
"""The least share of a backward that its second part must have, so that splitting it is worth the overhead."""


class SavedBytes:
    """Counts the distinct memory that autograd saves for backward, without the parameters."""

    def __init__(self, parameters: Iterator[torch.nn.Parameter]) -> None:
        self._known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.bytes = 0

    def note(self, tensor: torch.Tensor) -> torch.Tensor:
        """Counts a tensor's storage; a pack hook for `torch.autograd.graph.saved_tensors_hooks`."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    def noted(self) -> AbstractContextManager[Any]:
        """Returns a context in which the tensors that autograd saves are counted. Compiled code must not run in it."""
        return torch.autograd.graph.saved_tensors_hooks(self.note, _same)


@contextmanager
def buffers_restored(model: LayeredModel) -> Iterator[None]:
    """Restores all buffers, and their values, when the block ends."""
    modules = list(model.root.modules())
    kept = [dict(module._buffers) for module in modules]
    values = {id(buffer): copy(buffer) for each in kept for buffer in each.values() if buffer is not None}
    try:
        yield
    finally:
        for module, own in zip(modules, kept, strict=True):
            for name, buffer in own.items():
                module._buffers[name] = buffer
                if buffer is not None and not torch.equal(buffer, values[id(buffer)]):
                    buffer.copy_(values[id(buffer)])


def measure(model: LayeredModel, loss: Loss, numerics: Numerics, batch: Any, clock: Clock = time.thread_time) -> LayerProfile:
    """Returns the fields of `elastic.plan.workload.LayerCost` per layer for one micro-batch; the last layer's times include the loss.

    Runs the whole model once to warm up, counting its operations, then once or, if that is quick, a few times, and takes the least times.
    Then it splits backwards in two parts (`split_backward`), and compares their gradients with those of whole ones. Parameters and buffers
    are restored, gradients are dropped. `clock` returns seconds: by default CPU time of this thread, which other processes affect little.
    """
    with buffers_restored(model):
        saved, flops = _warm_up(model, loss, numerics, batch, clock)
        started, rows = clock(), _pass(model, loss, numerics, batch, clock)
        for _ in range(MOST_PASSES - 1):
            if clock() - started > ENOUGH_S:
                break
            for best, again in zip(rows, _pass(model, loss, numerics, batch, clock), strict=True):
                best[:2] = map(min, best[:2], again[:2])
        parts = _split_pass(model, loss, numerics, batch, clock)
        split = [[share * row[1] for share in parts.get(index, (0.0, 0.0))] for index, row in enumerate(rows)]
        return [[*row[:3], kept, *row[4:], *both, count] for row, kept, both, count in zip(rows, saved, split, flops, strict=True)]


def _warm_up(model: LayeredModel, loss: Loss, numerics: Numerics, batch: Any, clock: Clock) -> tuple[list[float], list[int]]:
    """Runs the whole model, and returns of each layer the bytes that autograd saves, and the operations, 0 if they cannot be counted.

    Compiled code runs as it was written for this, and then once more: it cannot be looked into.
    """
    counts = [FlopCount() for _ in model.layers]
    try:
        with eager():
            rows = _pass(model, loss, numerics, batch, clock, looks=True, counts=counts)
        if may_compile():
            _pass(model, loss, numerics, batch, clock)
    except Exception:  # of code that cannot be counted, or of the model's: then it is raised again here
        counts = [FlopCount(known=False) for _ in model.layers]
        for parameter in model.root.parameters():
            parameter.grad = None
        rows = _pass(model, loss, numerics, batch, clock, looks=not may_compile())
    return [row[3] for row in rows], flops_of(counts)


def runners_of(model: LayeredModel, loss: Loss, numerics: Numerics) -> tuple[list[LayerRunner], LossRunner]:
    generators = Generators()
    runners = [LayerRunner(index, layer, numerics, generators, model.running.statistics) for index, layer in enumerate(model.layers)]
    return runners, LossRunner(len(runners), loss, numerics, generators)


def _split_pass(model: LayeredModel, loss: Loss, numerics: Numerics, batch: Any, clock: Clock) -> dict[int, tuple[float, float]]:
    """Returns the seconds of both parts of split backwards, relative to whole ones, of layers where it is worth it and bits are equal."""
    runners, loss_runner = runners_of(model, loss, numerics)
    crossing = enter(model_input(batch), "the first micro-batch")
    runs: list[tuple[LayerRun, Crossing]] = []
    for runner in runners:
        entering = replace(crossing, tensors=tuple(None if tensor is None else copy(tensor) for tensor in crossing.tensors))
        run, crossing = runner.forward(0, 0, crossing)
        runs.append((run, entering))
    gradients = loss_runner.backward(loss_runner.forward(0, 0, crossing, batch, 0)[0])
    found: dict[int, tuple[float, float]] = {}
    for runner in reversed(runners):
        run, entering = runs.pop()
        started = clock()
        whole = runner.backward(0, 0, run, gradients)
        whole_s = clock() - started
        if (parts := split_parts(runner, entering, gradients, [*whole, *taken(runner)], clock)) and parts[1] > WORTH_SPLITTING * whole_s:
            found[runner.index] = parts[0] / whole_s, parts[1] / whole_s
        gradients = whole
    return found


def split_parts(
    runner: LayerRunner, entering: Crossing, gradients: Gradients, wanted: Sequence[torch.Tensor | None], clock: Clock
) -> tuple[float, float] | None:
    """Returns seconds of both parts of a split backward; None if it cannot be split, or its gradients have not the bits of `wanted`."""
    try:
        run, _ = runner.forward(0, 0, entering)
        started = clock()
        of_input, left = runner.backward_in_parts(0, 0, run, gradients, split=True)
        input_s, started = clock() - started, clock()
        if left is None:
            return None
        left.compute()
        weight_s = clock() - started
        return (input_s, weight_s) if _equal([*of_input, *taken(runner)], wanted) else None
    except RuntimeError:  # an operation of the layer's cannot run backward in parts, as some compiled code and checkpointing cannot
        return None
    finally:
        taken(runner)


def taken(runner: LayerRunner) -> list[torch.Tensor | None]:
    """Returns the gradients of the layer's parameters, which have none afterwards."""
    gradients = [parameter.grad for parameter in runner.parameters]
    for parameter in runner.parameters:
        parameter.grad = None
    return gradients


def _equal(some: Sequence[torch.Tensor | None], others: Sequence[torch.Tensor | None]) -> bool:
    return all(
        one is other if one is None or other is None else torch.equal(one, other) and one.stride() == other.stride()
        for one, other in zip(some, others, strict=True)
    )


def _pass(
    model: LayeredModel, loss: Loss, numerics: Numerics, batch: Any, clock: Clock, *, looks: bool = False, counts: Sequence[FlopCount] = ()
) -> LayerProfile:
    """Returns the first fields of `LayerCost` for each layer, with the bytes that autograd saves only if it `looks` at them."""
    runners, loss_runner = runners_of(model, loss, numerics)
    crossing = enter(model_input(batch), "the first micro-batch")
    rows: LayerProfile = []
    runs: list[LayerRun] = []
    for runner in runners:
        saved = SavedBytes(model.root.parameters())
        started = clock()
        with saved.noted() if looks else nullcontext(), counts[runner.index] if counts else nullcontext():
            run, crossing = runner.forward(0, 0, crossing)
        seconds, (size, itemsize) = clock() - started, model.trained(runner.index)
        rows.append([seconds, 0.0, size, saved.bytes, sum(map(size_of, crossing.tensors)), itemsize])
        runs.append(run)
    started = clock()
    with counts[-1] if counts else nullcontext():
        loss_run, _ = loss_runner.forward(0, 0, crossing, batch, 0)
    with counts[-1].backward() if counts else nullcontext():
        gradients = loss_runner.backward(loss_run)
    rows[-1][1] += clock() - started
    for runner in reversed(runners):
        started = clock()
        with counts[runner.index].backward() if counts else nullcontext():
            gradients = runner.backward(0, 0, runs.pop(), gradients)
        rows[runner.index][1] += clock() - started
    for parameter in model.root.parameters():
        parameter.grad = None
    return rows


def size_of(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
