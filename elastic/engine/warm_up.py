"""Runs layers once in a worker that is about to join, so that its first step does not pay for what a process does only once.

That is: choosing kernels, compiling code (`torch.compile`), and the first use of the allocator's memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from elastic.engine import randomness
from elastic.engine.boundary import Crossing
from elastic.engine.data import model_input
from elastic.engine.model import LayeredModel
from elastic.engine.numerics import Numerics
from elastic.engine.profile import buffers_restored
from elastic.engine.randomness import Generators
from elastic.engine.stage import LayerRunner, Loss, LossRunner, enter
from elastic.memory.tensors import zeros_like


def warm_up(model: LayeredModel, loss: Loss, numerics: Numerics, load: Callable[[], Any]) -> None:
    """Runs one layer of each kind, and the loss, forward and backward on the micro-batch that `load` returns.

    Layers are of one kind if they look alike (class, settings, parameters) and get alike inputs. Nothing that the training uses changes:
    generators, buffers and gradients are restored. An exception of the user's code ends it: a step will raise it again.
    """
    before = [(parameter, parameter.grad) for parameter in model.root.parameters()]
    try:
        with suppress(Exception), randomness.kept(), buffers_restored(model), torch.enable_grad():
            _run(model, loss, numerics, load())
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient
        model.running.statistics.begin()


def _run(model: LayeredModel, loss: Loss, numerics: Numerics, batch: Any) -> None:
    generators = Generators()
    crossing = enter(model_input(batch), "the first micro-batch")
    known: dict[Any, Crossing] = {}
    for index, layer in enumerate(model.layers):
        kind = kind_of(layer, crossing)
        if kind in known:
            crossing = known[kind]
            continue
        runner = LayerRunner(index, layer, numerics, generators, model.running.statistics)
        with model.lent(index):
            run, crossing = runner.forward(0, 0, crossing)
            runner.backward(0, 0, run, [None if each is None else zeros_like(each) for each in crossing.tensors])
        known[kind] = crossing
    runner = LossRunner(len(model.layers), loss, numerics, generators)
    runner.backward(runner.forward(0, 0, crossing, batch, 0)[0])


def kind_of(layer: nn.Module, crossing: Crossing) -> Any:
    """Returns a key that is equal for layers of one kind. A compiled layer is alone: its code may depend on its parameters."""
    if any(hasattr(module, "_orig_mod") for module in layer.modules()):
        return id(layer)
    parameters = tuple((name, each.shape, each.dtype, each.requires_grad) for name, each in layer.named_parameters())
    inputs = tuple(None if each is None else (each.shape, each.dtype) for each in crossing.tensors)
    return type(layer), repr(layer), layer.training, parameters, repr(crossing.structure), crossing.differentiable, inputs
