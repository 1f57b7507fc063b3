"""What a worker holds of one micro-batch of a step under way, so that the next view does not compute it again.

The autograd graph is cut at every layer, so what is held of a layer depends on nothing but the layer's parameters and its input. It is the
same in the next view if that takes the same step, and if this worker still has the layer, in the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from elastic.engine.boundary import Crossing
from elastic.engine.model import Vector
from elastic.engine.reduction import Parts
from elastic.engine.split_backward import Remainder
from elastic.engine.stage import Gradients, LayerRun, LossLeaf


class Output:
    """The output of a layer, which an operation in place of the next layer may change."""

    def __init__(self, crossing: Crossing) -> None:
        self.crossing = crossing
        self._versions = self._now()

    @property
    def intact(self) -> bool:
        """Whether the output is still as the layer gave it."""
        return self._versions == self._now()

    def _now(self) -> list[int]:
        return [tensor._version for tensor in self.crossing.tensors if tensor is not None]


@dataclass(slots=True)
class InFlight:
    """One micro-batch on its way through `layers` and back.

    `runs` and `outputs` are of layers whose forward is done and whose backward is not. `output` is that of the last of `layers`.
    Backward is done from the end down to layer `below`, which is one past the last before it begins. `gradients` are those of the input of
    layer `below`, or of the output of the last layer; None before the backward begins. `found` are gradients that are not summed,
    `left` the second parts of split backwards.
    """

    layers: range
    below: int
    runs: dict[int, LayerRun] = field(default_factory=dict)
    outputs: dict[int, Output] = field(default_factory=dict)
    output: Output | None = None
    loss: LayerRun | None = None
    leaf: LossLeaf | None = None
    gradients: Gradients | None = None
    found: list[tuple[Vector, Parts]] = field(default_factory=list)
    left: dict[int, Remainder] = field(default_factory=dict)
    fresh: bool = True  # whether all that is held of it was computed in this view

    @classmethod
    def through(cls, layers: range) -> InFlight:
        """Returns a micro-batch that has not entered these layers."""
        return cls(layers=layers, below=layers.stop)

    @property
    def begun(self) -> bool:
        """Whether its backward has begun."""
        return self.gradients is not None

    @property
    def reads_input(self) -> bool:
        """Whether the forward of the first layer is still to be computed."""
        return self.layers.start < self.below and self.layers.start not in self.runs

    def went_forward(self, layer: int, run: LayerRun, crossing: Crossing) -> None:
        """Notes the forward of a layer."""
        self.runs[layer], self.outputs[layer] = run, Output(crossing)
        if layer == self.layers.stop - 1:
            self.output = self.outputs[layer]

    def went_backward(self, layer: int, gradients: Gradients, found: list[tuple[Vector, Parts]]) -> None:
        """Notes the backward of a layer, which gave the gradients of its input and of its parameters."""
        del self.runs[layer], self.outputs[layer]
        self.gradients, self.below = gradients, layer
        self.found += found

    def fit(self, layers: range, model_layers: int, same: Callable[[int], bool], summed: Callable[[int], bool]) -> None:
        """Drops what is of no use to a worker that has `layers` now.

        `same(layer)`: its parameters lie where they lay; `summed(layer)`: the micro-batch is in the sums of all its parameters.
        """
        last, self.fresh = layers.stop == model_layers, False
        there = {vector.layer for vector, _ in self.found}.union(self.left)
        usable = self.layers.stop == layers.stop and self.below >= layers.start and (self.output is not None or last)
        passed = range(self.below, layers.stop)
        if self.begun and not (usable and all(layer in there or summed(layer) for layer in passed)):
            self.gradients, self.loss, self.leaf, self.found, self.below = None, None, None, [], layers.stop
            self.left = {}
        if self.layers.stop != layers.stop:
            self.output, self.loss, self.leaf, self.below = None, None, None, layers.stop
        self.layers = layers
        for layer in [layer for layer in self.runs if layer not in layers or layer >= self.below or not same(layer)]:
            del self.runs[layer], self.outputs[layer]
        if not self.begun:
            self.output = self.outputs.get(layers.stop - 1)
            if self.output is None:
                self.loss, self.leaf = None, None
        reads = not self.begun and (self.loss is None if last else True)  # whether the last layer's output is read again
        for layer in reversed(range(layers.start, self.below)):
            if layer in self.runs and reads and not self.outputs[layer].intact:
                del self.runs[layer], self.outputs[layer]
                if layer == layers.stop - 1:
                    self.output = None
            reads = layer not in self.runs
