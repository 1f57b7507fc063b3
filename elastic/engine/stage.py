"""Runs one layer at a time: forward and backward, with the autograd graph cut at every layer boundary, also inside a stage.

The input of a layer is a detached, contiguous, 64-byte aligned alias of the previous layer's output, and the gradient passed back is
contiguous. A micro-batch therefore runs the same kernels on the same shapes and alignment, whether or not the boundary lies between two
workers. That is why the layout does not change bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from elastic.engine.boundary import Crossing, flatten, unflatten
from elastic.engine.determinism import refuse
from elastic.engine.numerics import Numerics, alias
from elastic.engine.randomness import GeneratorKey, Generators
from elastic.engine.split_backward import Remainder, first_part
from elastic.engine.statistics import Statistics
from elastic.engine.structure import takes_keywords
from elastic.errors import TrainerError
from elastic.memory.tensors import contiguous, copy, filled

Gradients = Sequence[torch.Tensor | None]
Loss = Callable[[Any, Any], Any]


@dataclass(slots=True, kw_only=True)
class LayerRun:
    """What one layer keeps of one micro-batch between forward and backward. `outputs` is None if backward recomputes them."""

    leaves: list[torch.Tensor]
    structure: Any
    outputs: list[torch.Tensor] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LossLeaf:
    """The loss of one micro-batch: its value (a weighted sum if the loss returns a weight), its weight and its number of tokens."""

    micro_batch: int
    value: float
    weight: float
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return {name: getattr(self, name) for name in self.__slots__}


def enter(value: Any, where: str) -> Crossing:
    """Returns a batch as input of the first layer; no tensor in it receives a gradient."""
    structure, tensors = flatten(value, where)
    return Crossing(structure=structure, tensors=tuple(contiguous(t.detach()) for t in tensors), differentiable=(False,) * len(tensors))


def leaves_of(crossing: Crossing) -> list[torch.Tensor]:
    """Returns new autograd leaves that share the memory of a crossing's tensors."""
    pairs = zip(crossing.tensors, crossing.differentiable, strict=True)
    return [tensor.detach().requires_grad_(wanted) for tensor, wanted in pairs if tensor is not None]


def gradients_of(leaves: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """Returns the gradient of each leaf, contiguous; None if it has none."""
    return [None if leaf.grad is None else contiguous(leaf.grad) for leaf in leaves]


class LayerRunner:
    """Runs one layer of the model."""

    def __init__(self, index: int, module: nn.Module, numerics: Numerics, generators: Generators, statistics: Statistics) -> None:
        self._statistics = statistics
        self.index = index
        self.name = f"layer {index} ({type(module).__name__})"  # in errors
        self.module = module
        self.numerics = numerics
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.recomputes = numerics.recomputes(index, module)
        self._generators = generators
        self._taken: dict[frozenset[str], bool] = {}  # whether a dict with these names is passed as keyword arguments

    def key(self, step: int, micro_batch: int) -> GeneratorKey:
        """Returns the key of the layer's random numbers."""
        return self.numerics.seed, step, micro_batch, self.index

    def forward(self, step: int, micro_batch: int, crossing: Crossing) -> tuple[LayerRun, Crossing]:
        """Runs the layer with its key; returns what backward needs, and the layer's output, detached from its graph."""
        leaves = leaves_of(crossing)
        run = LayerRun(leaves=leaves, structure=crossing.structure, outputs=None)
        if self.recomputes:
            # On copies: the layer may start with an in-place operation, and the recomputation needs the leaves unchanged.
            with self._statistics.during(self.index, micro_batch), torch.no_grad():
                structure, outputs = self._call(step, micro_batch, [copy(leaf.detach()) for leaf in leaves], crossing.structure)
            reachable = bool(self.parameters) or any(crossing.differentiable)
            differentiable = tuple(reachable and (o.is_floating_point() or o.is_complex()) for o in outputs)
        else:
            with self._statistics.during(self.index, micro_batch):
                structure, outputs = self._call(step, micro_batch, [alias(leaf) for leaf in leaves], crossing.structure)
            run.outputs = outputs
            differentiable = tuple(output.requires_grad for output in outputs)
        return run, Crossing(structure=structure, tensors=tuple(contiguous(o.detach()) for o in outputs), differentiable=differentiable)

    def backward(self, step: int, micro_batch: int, run: LayerRun, gradients: Gradients) -> list[torch.Tensor | None]:
        """Adds to the parameters' `.grad`; returns the gradient of every input tensor, None if it has none."""
        return self.backward_in_parts(step, micro_batch, run, gradients, split=False)[0]

    def backward_in_parts(
        self, step: int, micro_batch: int, run: LayerRun, gradients: Gradients, *, split: bool
    ) -> tuple[list[torch.Tensor | None], Remainder | None]:
        """Returns the gradient of every input tensor, and what is left to compute: None if that is nothing, as without `split`."""
        outputs = run.outputs
        if outputs is None:
            with self._statistics.during(self.index, None):
                _, outputs = self._call(step, micro_batch, [alias(leaf) for leaf in run.leaves], run.structure)
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
        remainder = None
        if pairs:
            tensors, arrived = [output for output, _ in pairs], [gradient for _, gradient in pairs]
            try:
                remainder = first_part(tensors, arrived, run.leaves, self.parameters) if split and run.outputs is not None else None
                if remainder is None:
                    torch.autograd.backward(tensors, arrived)
            except RuntimeError as error:
                refuse(error, f"the backward of {self.name}")
                raise
        return gradients_of(run.leaves), remainder

    def evaluate(self, step: int, micro_batch: int, crossing: Crossing) -> Crossing:
        """Runs the forward only, without a graph."""
        with torch.no_grad():
            inputs = [tensor for tensor in crossing.tensors if tensor is not None]
            structure, outputs = self._call(step, micro_batch, inputs, crossing.structure, evaluation_key(self.key(step, micro_batch)))
        return Crossing(structure=structure, tensors=tuple(contiguous(o) for o in outputs), differentiable=(False,) * len(outputs))

    def _by_keyword(self, value: Any) -> bool:
        """Returns whether this is the first layer and takes the items of a batch as keyword arguments."""
        if self.index > 0 or type(value) is not dict:
            return False
        names = frozenset(value)
        if names not in self._taken:
            self._taken[names] = takes_keywords(self.module.forward, value)
        return self._taken[names]

    def _call(
        self, step: int, micro_batch: int, inputs: Sequence[torch.Tensor], structure: Any, key: GeneratorKey | None = None
    ) -> tuple[Any, list[torch.Tensor]]:
        self._generators.enter(*(key or self.key(step, micro_batch)))
        try:
            with self.numerics.precision():
                value = unflatten(structure, inputs)
                result = self.module(**value) if self._by_keyword(value) else self.module(value)
        except RuntimeError as error:
            refuse(error, self.name)
            raise
        return flatten(result, self.name)


def evaluation_key(key: GeneratorKey) -> GeneratorKey:
    """Returns the key of an evaluation. It omits the step, because there the step is a message counter, which depends on the layout."""
    seed, _, micro_batch, layer = key
    return seed, "evaluate", micro_batch, layer


class LossRunner:
    """Runs the loss: `loss(output, micro_batch)` returns the micro-batch's mean loss, or `(sum, weight)`."""

    def __init__(self, layers: int, loss: Loss, numerics: Numerics, generators: Generators) -> None:
        self.index = layers  # the key after the last layer's
        self.loss = loss
        self.numerics = numerics
        self._generators = generators

    def key(self, step: int, micro_batch: int) -> GeneratorKey:
        """Returns the key of the loss's random numbers."""
        return self.numerics.seed, step, micro_batch, self.index

    def forward(self, step: int, micro_batch: int, crossing: Crossing, batch: Any, tokens: int) -> tuple[LayerRun, LossLeaf]:
        """Returns the loss of one micro-batch, with its graph.

        Raises:
            TrainerError: if the loss is not a scalar tensor or `(scalar tensor, weight)`, or depends on no parameter.
        """
        leaves = leaves_of(crossing)
        where = f"the loss of step {step}, micro-batch {micro_batch}"
        output = unflatten(crossing.structure, [alias(leaf) for leaf in leaves])
        value, weight = read_loss(self._call(self.key(step, micro_batch), output, batch), where)
        weight = 1.0 if weight is None else weight
        if weight and not value.requires_grad:
            raise TrainerError(
                f"{where} does not depend on the model's parameters, so training would change nothing: it was detached from their graph, "
                "for example by detach(), no_grad(), item() or numpy()"
            )
        if not weight and not math.isfinite(float(value.detach())):
            value = torch.tensor(0.0)  # for example a mean over no tokens; its weight is 0
        run = LayerRun(leaves=leaves, structure=crossing.structure, outputs=[value])
        return run, LossLeaf(micro_batch=micro_batch, value=float(value.detach()), weight=weight, tokens=tokens)

    def backward(self, run: LayerRun) -> list[torch.Tensor | None]:
        """Returns the gradient of the model's output, times the loss scale, and not yet divided by the total weight: the sum over
        micro-batches is divided once."""
        if run.outputs is not None and run.outputs[0].requires_grad:
            try:
                run.outputs[0].backward(self._first_gradient(run.outputs[0]))
            except RuntimeError as error:
                refuse(error, "the backward of the loss")
                raise
        return gradients_of(run.leaves)

    def _first_gradient(self, loss: torch.Tensor) -> torch.Tensor | None:
        scale = self.numerics.scale
        return None if scale is None else filled(loss.shape, scale.value, loss.dtype)

    def evaluate(self, step: int, micro_batch: int, crossing: Crossing, batch: Any, tokens: int, share: float = 1.0) -> LossLeaf:
        """Returns the loss without a graph. `share` is the weight of the micro-batch if the loss returns none."""
        with torch.no_grad():
            inputs = [tensor for tensor in crossing.tensors if tensor is not None]
            result = self._call(evaluation_key(self.key(step, micro_batch)), unflatten(crossing.structure, inputs), batch)
        value, weight = read_loss(result, f"the loss of micro-batch {micro_batch} of an evaluation")
        if weight is None:
            return LossLeaf(micro_batch=micro_batch, value=float(value) * share, weight=share, tokens=tokens)
        return LossLeaf(micro_batch=micro_batch, value=float(value) if weight else 0.0, weight=weight, tokens=tokens)

    def _call(self, key: GeneratorKey, output: Any, batch: Any) -> Any:
        self._generators.enter(*key)
        try:
            with self.numerics.precision():
                return self.loss(output, batch)
        except RuntimeError as error:
            refuse(error, "the loss")
            raise


def read_loss(result: Any, where: str) -> tuple[torch.Tensor, float | None]:
    """Returns the scalar tensor and the weight that a loss function returned; the weight is None if it returned none.

    Raises:
        TrainerError: if it returned anything else; the message names `where` and the type or value.
    """
    value, given = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else _named(value)
        raise TrainerError(f"{where} is {shape}: return a scalar tensor, or (sum, weight)")
    if value.is_complex():
        raise TrainerError(f"{where} is complex: return a real scalar tensor, or (sum, weight)")
    if given is None:
        return value, None
    if isinstance(given, torch.Tensor) and (given.ndim or given.requires_grad):
        raise TrainerError(
            f"{where} came with a {'prediction' if given.ndim else 'tensor that has a gradient'} (shape {tuple(given.shape)}) where "
            "its weight is expected: return the loss alone, or (sum, weight) with a number as weight"
        )
    if not isinstance(given, bool | int | float | np.number | torch.Tensor):
        raise TrainerError(f"{where} came with {_named(given)} where its weight is expected: return the loss alone, or (sum, weight)")
    weight = float(given)
    if not (math.isfinite(weight) and weight >= 0):
        raise TrainerError(f"{where} has the weight {weight}: a weight, such as a number of tokens, is finite and not below 0")
    return value, weight


def _named(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)} ({', '.join(type(each).__name__ for each in value)})"
    return f"a {type(value).__name__}"
