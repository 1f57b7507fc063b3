"""Compares layers with the model that they were cut from: one micro-batch, forward and backward, bit for bit.

The engine's own runners compute the layers. The uncut model gets the same random numbers: the generators are keyed where a layer begins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from elastic.engine import randomness
from elastic.engine.boundary import Crossing, unflatten
from elastic.engine.cutting.body import WAYS, body_of
from elastic.engine.cutting.forwarding import invoke, without_cache
from elastic.engine.data import model_input
from elastic.engine.model import LayeredModel
from elastic.engine.numerics import Numerics
from elastic.engine.profile import buffers_restored
from elastic.engine.randomness import GeneratorKey, Generators
from elastic.engine.stage import LayerRunner, Loss, LossRunner, enter
from elastic.errors import TrainerError
from elastic.memory.tensors import bytes_of, contiguous

_STEP = _MICRO_BATCH = 0


@dataclass(frozen=True, slots=True)
class Computed:
    """Digests of what one run has computed: the output's tensors, the loss, and the gradient of each parameter."""

    output: tuple[str, ...]
    loss: str
    gradients: Mapping[str, str | None]


def some_loss(output: Any, _: Any) -> torch.Tensor:
    """Returns a loss that depends on all floating-point tensors of an output."""
    found = [each for each in tree_leaves(dict(output) if isinstance(output, dict) else output) if isinstance(each, torch.Tensor)]
    return sum((each.float().square().mean() for each in found if each.is_floating_point() and each.requires_grad), torch.tensor(0.0))


def check(layered: LayeredModel, cut: nn.Module, loss: Loss, numerics: Numerics, batch: Any) -> None:
    """Compares the layers of `cut` (in `layered`) with `cut.model`. Generators, buffers and gradients are restored.

    Raises:
        TrainerError: naming what differs.
    """
    model: nn.Module = cut.model  # type: ignore[assignment]
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.grad for name, parameter in trained.items()}
    try:
        with randomness.kept(), buffers_restored(layered), torch.enable_grad():
            _drop(trained)
            wanted = _uncut(layered, model, loss, numerics, batch, trained)
            _drop(trained)
            found = _layers(layered, loss, numerics, batch, trained)
    finally:
        for name, parameter in trained.items():
            parameter.grad = before[name]
        layered.running.statistics.begin()
    if what := _difference(wanted, found):
        raise TrainerError(
            f"the layers that {type(model).__name__} was cut into do not compute what it computes: {what} has other bits. Its forward uses "
            f"more than what the last block returns, such as results of other blocks (output_hidden_states). {WAYS}"
        )


def _drop(parameters: Mapping[str, nn.Parameter]) -> None:
    for parameter in parameters.values():
        parameter.grad = None


def _difference(wanted: Computed, found: Computed) -> str | None:
    if wanted.output != found.output:
        return "the output"
    if wanted.loss != found.loss:
        return "the loss"
    return next((f"the gradient of {name}" for name, value in wanted.gradients.items() if found.gradients[name] != value), None)


def _key(numerics: Numerics, layer: int) -> GeneratorKey:
    return numerics.seed, _STEP, _MICRO_BATCH, layer


def _uncut(
    layered: LayeredModel, model: nn.Module, loss: Loss, numerics: Numerics, batch: Any, trained: Mapping[str, nn.Parameter]
) -> Computed:
    generators = Generators()
    count = len(layered.layers)
    with without_cache(model), layered.running.statistics.during(0, None), numerics.precision(), _keyed(model, generators, numerics):
        generators.enter(*_key(numerics, 0))
        output = invoke(model, model_input(batch))
    generators.enter(*_key(numerics, count))
    with numerics.precision():
        result = loss(output, batch)
    value = result[0] if isinstance(result, tuple) else result
    if value.requires_grad:
        (value if numerics.scale is None else value * numerics.scale.value).backward()
    return Computed(output=_digests(output), loss=_digest(value), gradients=_gradients(trained))


@contextmanager
def _keyed(model: nn.Module, generators: Generators, numerics: Numerics) -> Iterator[None]:
    """Keys the generators where a layer begins, and drops cached casts there, as they are cached within a layer only."""

    def begin(layer: int) -> None:
        generators.enter(*_key(numerics, layer))
        torch.clear_autocast_cache()

    blocks = body_of(model).blocks
    with ExitStack() as stack:
        for index, block in enumerate(blocks, start=1):
            stack.callback(block.register_forward_pre_hook(lambda *_, index=index: begin(index)).remove)
        stack.callback(blocks[-1].register_forward_hook(lambda *_: begin(len(blocks) + 1)).remove)
        yield


def _layers(layered: LayeredModel, loss: Loss, numerics: Numerics, batch: Any, trained: Mapping[str, nn.Parameter]) -> Computed:
    generators = Generators()
    runners = [LayerRunner(index, layer, numerics, generators, layered.running.statistics) for index, layer in enumerate(layered.layers)]
    last = LossRunner(len(runners), loss, numerics, generators)
    crossing: Crossing = enter(model_input(batch), "the first micro-batch")
    runs = []
    for runner in runners:
        run, crossing = runner.forward(_STEP, _MICRO_BATCH, crossing)
        runs.append(run)
    output = _digests(unflatten(crossing.structure, [each for each in crossing.tensors if each is not None]))
    loss_run, _ = last.forward(_STEP, _MICRO_BATCH, crossing, batch, 0)
    value = _digest((loss_run.outputs or [])[0])
    gradients = last.backward(loss_run)
    for runner in reversed(runners):
        gradients = runner.backward(_STEP, _MICRO_BATCH, runs.pop(), gradients)
    return Computed(output=output, loss=value, gradients=_gradients(trained))


def _gradients(trained: Mapping[str, nn.Parameter]) -> dict[str, str | None]:
    return {name: None if parameter.grad is None else _digest(parameter.grad) for name, parameter in trained.items()}


def _digests(output: Any) -> tuple[str, ...]:
    leaves = tree_leaves(dict(output) if isinstance(output, dict) else output)
    return tuple(_digest(each) for each in leaves if isinstance(each, torch.Tensor))


def _digest(tensor: torch.Tensor) -> str:
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.blake2b(bytes_of(contiguous(dense)).data, digest_size=16).hexdigest()}"
