"""Computes a layer's backward in two parts: the gradient of its input first, that of its matrices later.

The neighbour in the pipeline waits for the first part only. Both parts run the kernels of a whole backward on the same operands, so the
bits are the same: autograd's node of a matrix product computes the gradient of each operand by a product of its own. The second part needs
the gradient of each product's result, which is caught on its way through the first. What is not the operand of such a product, or is used
more than once, belongs to the first part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, Node

_PRODUCTS = frozenset({"AddmmBackward0", "MmBackward0", "LinearBackward0", "ConvolutionBackward0"})
_PASSED = frozenset({"TBackward0", "TransposeBackward0", "ToCopyBackward0", "ViewBackward0", "UnsafeViewBackward0"})
"""Nodes between a parameter and its product."""


@dataclass(slots=True)
class Remainder:
    """The second part of one layer's backward: products with the gradients of their results, and gradients that the first part found."""

    products: list[tuple[Node, torch.Tensor, list[nn.Parameter]]] = field(default_factory=list)
    found: list[tuple[nn.Parameter, torch.Tensor | None]] = field(default_factory=list)

    def compute(self) -> None:
        """Computes what is left; afterwards all the layer's parameters have their `.grad`."""
        for product, gradient, parameters in self.products:
            torch.autograd.backward([GradientEdge(product, 0)], [gradient], inputs=parameters)
        for parameter, gradient in self.found:
            parameter.grad = gradient
        self.products, self.found = [], []


def first_part(
    outputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor], parameters: Sequence[nn.Parameter]
) -> Remainder | None:
    """Sets the `.grad` of the leaves, and returns the rest of the backward; None, with nothing computed, if it cannot be split.

    `gradients` are those of `outputs`, tensor by tensor. No parameter may have a `.grad`.
    """
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    products = _products(outputs, wanted, parameters)
    if not products:
        return None
    later = {id(parameter) for operands in products.values() for parameter in operands}
    now = [parameter for parameter in parameters if id(parameter) not in later]
    caught: dict[Node, torch.Tensor] = {}
    hooks = [product.register_prehook(_Catch(caught, product)) for product in products]
    try:
        torch.autograd.backward(outputs, gradients, inputs=[*wanted, *now], retain_graph=True)
    finally:
        for hook in hooks:
            hook.remove()
    remainder = Remainder(
        products=[(product, caught[product], operands) for product, operands in products.items() if product in caught],
        found=[(parameter, parameter.grad) for parameter in now],
    )
    for parameter in now:
        parameter.grad = None
    return remainder


class _Catch:
    """Keeps the gradient that arrives at a product."""

    def __init__(self, caught: dict[Node, torch.Tensor], product: Node) -> None:
        self._caught, self._product = caught, product

    def __call__(self, gradients: tuple[Any, ...]) -> None:
        if gradients[0] is not None:
            self._caught[self._product] = gradients[0]


def _products(
    outputs: Iterable[torch.Tensor], leaves: Sequence[torch.Tensor], parameters: Sequence[nn.Parameter]
) -> dict[Node, list[nn.Parameter]]:
    """Returns the products that the gradient of a leaf passes through, each with the parameters that are used there and nowhere else."""
    parents, ends = _graph(outputs)
    if not leaves or any(parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter in parameters):
        return {}
    passed: set[Node] = set()
    pending = [ends[id(leaf)] for leaf in leaves if id(leaf) in ends]
    while pending:
        node = pending.pop()
        if node not in passed:
            passed.add(node)
            pending += parents.get(node, [])
    found: dict[Node, list[nn.Parameter]] = {}
    for parameter in parameters:
        product = _product(ends.get(id(parameter)), parents)
        if product in passed:
            found.setdefault(product, []).append(parameter)
    return found


def _product(end: Node | None, parents: dict[Node, list[Node]]) -> Node | None:
    """Returns the product that a parameter is an operand of, None if it has another use."""
    node = end
    while node is not None:
        above = parents.get(node, [])
        if len(above) != 1:
            return None
        node = above[0]
        if node.name() in _PRODUCTS:
            return node
        if node.name() not in _PASSED:
            return None
    return None


def _graph(outputs: Iterable[torch.Tensor]) -> tuple[dict[Node, list[Node]], dict[int, Node]]:
    """Returns the graph's edges from below, one for each use, and the node at which each leaf's gradient ends, by the leaf's id."""
    parents: dict[Node, list[Node]] = {}
    ends: dict[int, Node] = {}
    pending = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        for below, _ in node.next_functions:
            if below is None:
                continue
            parents.setdefault(below, []).append(node)
            if below not in seen:
                seen.add(below)
                leaf = getattr(below, "variable", None)
                if leaf is None:
                    pending.append(below)
                else:
                    ends[id(leaf)] = below
    return parents, ends
