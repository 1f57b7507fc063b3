"""Measures the cost of layers one after the other, for a model that no worker has as a whole: each has memory only while it is measured."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from elastic.engine.boundary import Crossing
from elastic.engine.data import model_input
from elastic.engine.flops import FlopCount, counted, flops_of
from elastic.engine.model import LayeredModel
from elastic.engine.numerics import Numerics
from elastic.engine.profile import (
    ENOUGH_S,
    MOST_PASSES,
    WORTH_SPLITTING,
    Clock,
    LayerProfile,
    SavedBytes,
    buffers_restored,
    runners_of,
    size_of,
    split_parts,
    taken,
)
from elastic.engine.stage import Gradients, LayerRunner, Loss, LossRunner, enter
from elastic.engine.warm_up import kind_of
from elastic.errors import TrainerError
from elastic.memory.tensors import copy


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """Seconds of a layer's forward and backward, and of both parts of a split backward; bytes that autograd keeps; operations; output."""

    forward_s: float
    backward_s: float
    saved: int
    parts: tuple[float, float]
    count: FlopCount
    output: Crossing


def measure_apart(model: LayeredModel, loss: Loss, numerics: Numerics, batch: Any, clock: Clock = time.thread_time) -> LayerProfile:
    """Returns what `profile.measure` does. Layers of one kind (`warm_up.kind_of`) are measured once.

    A layer's backward gets its own output as gradient: times do not depend on values.
    """
    known: dict[Any, _Measured] = {}
    runners, loss_runner = runners_of(model, loss, numerics)
    crossing = enter(model_input(batch), "the first micro-batch")
    rows: LayerProfile = []
    counts: list[FlopCount] = []
    with buffers_restored(model):
        for runner in runners:
            kind = kind_of(runner.module, crossing)
            if kind not in known:
                with model.lent(runner.index), _without_values_named(runner):
                    known[kind] = _layer(runner, crossing, clock)
            found, (size, itemsize) = known[kind], model.trained(runner.index)
            crossing = found.output
            output = sum(map(size_of, crossing.tensors))
            counts.append(found.count)
            rows.append([found.forward_s, found.backward_s, size, found.saved, output, itemsize, *found.parts])
        rows[-1][1] += _loss_s(loss_runner, crossing, batch, clock)
    model.running.statistics.begin()
    return [[*row, count] for row, count in zip(rows, flops_of(counts), strict=True)]


@contextmanager
def _without_values_named(runner: LayerRunner) -> Iterator[None]:
    """Names a layer that computes with a tensor that stayed on meta, where the model was built."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
        raise TrainerError(
            f"layer {runner.index} ({type(runner.module).__name__}) computes with a tensor that was made while the model was built, and "
            f"has no values since it is neither a parameter nor a buffer ({error}): use register_buffer (persistent=False keeps it out of "
            "checkpoints), or give the Trainer the model itself instead of a function, so that every worker builds it"
        ) from error


def _layer(runner: LayerRunner, entering: Crossing, clock: Clock) -> _Measured:
    forward_s = backward_s = float("inf")
    count = _counted(runner, entering)
    began, saved, output, gradients = clock(), 0, entering, ()
    for number in range(MOST_PASSES + 1):  # the first one warms up
        meter = SavedBytes(iter(runner.module.parameters()))
        started = clock()
        with torch.autograd.graph.saved_tensors_hooks(meter.note, lambda tensor: tensor):
            run, output = runner.forward(0, 0, _copied(entering))
        ran = clock() - started
        gradients = _gradients(output)
        started = clock()
        of_input = runner.backward(0, 0, run, gradients)
        back = clock() - started
        whole = [*of_input, *taken(runner)]
        saved = meter.bytes
        if number:
            forward_s, backward_s = min(forward_s, ran), min(backward_s, back)
            if clock() - began > ENOUGH_S:
                break
        else:
            began = clock()
    parts = split_parts(runner, _copied(entering), gradients, whole, clock)
    worth = parts is not None and parts[1] > WORTH_SPLITTING * backward_s
    return _Measured(
        forward_s=forward_s, backward_s=backward_s, saved=saved, parts=parts if parts and worth else (0.0, 0.0), count=count, output=output
    )


def _counted(runner: LayerRunner, entering: Crossing) -> FlopCount:
    """Counts the operations of a layer's forward and backward."""
    count = FlopCount()
    try:
        with counted(count):
            run, output = runner.forward(0, 0, _copied(entering))
        with counted(count.backward()):
            runner.backward(0, 0, run, _gradients(output))
    except Exception:  # of code that cannot be counted, or of the model's: then it is raised again when it is measured
        return FlopCount(known=False)
    finally:
        taken(runner)
    return count


def _copied(crossing: Crossing) -> Crossing:
    """Returns a crossing that a layer may begin by changing."""
    tensors = tuple(None if each is None else copy(each) for each in crossing.tensors)
    return Crossing(structure=crossing.structure, tensors=tensors, differentiable=crossing.differentiable)


def _gradients(output: Crossing) -> Gradients:
    pairs = zip(output.tensors, output.differentiable, strict=True)
    return [copy(each) if each is not None and wanted else None for each, wanted in pairs]


def _loss_s(runner: LossRunner, crossing: Crossing, batch: Any, clock: Clock) -> float:
    runner.backward(runner.forward(0, 0, crossing, batch, 0)[0])  # warms up
    started = clock()
    runner.backward(runner.forward(0, 0, crossing, batch, 0)[0])
    return clock() - started
