"""Runs the uncut model once, and finds out what of it runs before its blocks, in them, and behind them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from elastic.engine import randomness
from elastic.engine.cutting.body import Body, refusal
from elastic.engine.cutting.forwarding import invoke, without_cache
from elastic.engine.cutting.wiring import Arguments, Wiring, named, tensors_in

Reached = set[int]
"""Parameters, by `id`."""


@dataclass(slots=True)
class Trace:
    """What a run of the uncut model has shown. Modules are those that were called, parameters those on which results depend."""

    wiring: Wiring
    last_output: Any
    modules_before: set[int]
    modules_behind: set[int]
    before: Reached
    behind: Reached


@dataclass(slots=True)
class _Seen:
    calls: list[Arguments] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    before: set[int] = field(default_factory=set)
    between: dict[int, nn.Module] = field(default_factory=dict)
    behind: set[int] = field(default_factory=set)


def trace(model: nn.Module, body: Body, inputs: Any) -> Trace:
    """Runs the model on `inputs`, with gradients, and returns what it has shown. Nothing of the model changes.

    Raises:
        TrainerError: if the model cannot be cut behind its blocks.
    """
    seen = _Seen()
    with ExitStack() as stack:
        for context in (randomness.kept(), torch.enable_grad(), _traceable(model), without_cache(model), _watched(model, body, seen)):
            stack.enter_context(context)
        result = invoke(model, inputs)
        return _read(model, body, seen, result)


def _read(model: nn.Module, body: Body, seen: _Seen, result: Any) -> Trace:
    if seen.order != list(range(len(body.blocks))):
        ran = ", ".join(map(str, seen.order[:12])) or "none"
        raise refusal(model, f"its forward does not call each block of {body.name} once, in order, but {ran}")
    if between := next((each for each in seen.between.values() if any(True for _ in each.parameters())), None):
        raise refusal(model, f"its forward calls a {type(between).__name__}, which has parameters, between the blocks of {body.name}")
    try:
        wiring = Wiring.of(seen.calls, seen.outputs)
    except ValueError as error:
        raise refusal(model, f"{error} ({body.name})") from error
    if tensors_in(seen.outputs[-1]) is None:
        raise refusal(model, f"{body.block_name(len(body.blocks) - 1)} returns a {type(seen.outputs[-1]).__name__}, which cannot cross")
    for block, module in enumerate(body.blocks):
        _check_block(model, body, block, module, seen)
    given = [value for arguments in seen.calls for name, value in arguments.items() if name not in wiring.carried]
    first = [value for name, value in seen.calls[0].items() if name in wiring.carried]
    return Trace(
        wiring=wiring,
        last_output=seen.outputs[-1],
        modules_before=seen.before,
        modules_behind=seen.behind,
        before=reached(_tensors([*given, *first]), ()),
        behind=reached(_tensors([result]), _tensors([seen.outputs[-1]])),
    )


def _check_block(model: nn.Module, body: Body, block: int, module: nn.Module, seen: _Seen) -> None:
    own = {id(parameter) for parameter in module.parameters()}
    used = reached(_tensors([seen.outputs[block]]), _tensors(seen.calls[block].values()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if stray := next((names[each] for each in used - own if each in names), None):
        raise refusal(model, f"{body.block_name(block)} uses {stray}, which lies outside of it")


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    """Returns the tensors in values and in containers of them."""
    plain = [dict(value) if isinstance(value, dict) else value for value in values]
    return [leaf for leaf in tree_leaves(plain) if isinstance(leaf, torch.Tensor)]


def reached(results: Iterable[torch.Tensor], inputs: Iterable[torch.Tensor]) -> Reached:
    """Returns the leaves, by `id`, from which autograd has computed the results, not counting `inputs` and what lies behind them."""
    inputs = list(inputs)
    ends = {each.grad_fn for each in inputs if each.grad_fn is not None}
    found: Reached = {id(each) for each in results if each.requires_grad and each.is_leaf}
    stack = [each.grad_fn for each in results if each.grad_fn is not None]
    known = set(ends)
    while stack:
        node = stack.pop()
        if node in known:
            continue
        known.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))  # pyright: ignore[reportAttributeAccessIssue]
        stack += [before for before, _ in node.next_functions if before is not None]
    return found - {id(each) for each in inputs if each.is_leaf}


@contextmanager
def _watched(model: nn.Module, body: Body, seen: _Seen) -> Iterator[None]:
    """Records the calls of modules while the block runs."""
    inside = {id(module) for block in body.blocks for module in block.modules()}
    running: list[int] = []
    count = len(body.blocks)

    def enters(block: int, positional: Any, keywords: Any) -> None:
        seen.order.append(block)
        seen.calls.append(named(positional, keywords))
        running.append(block)

    def leaves(output: Any) -> None:
        running.pop()
        seen.outputs.append(output)

    def called(module: nn.Module) -> None:
        if running:
            return
        if not seen.outputs:
            seen.before.add(id(module))
        elif len(seen.outputs) < count:
            seen.between[id(module)] = module
        else:
            seen.behind.add(id(module))

    with ExitStack() as stack:
        for index, block in enumerate(body.blocks):
            before = block.register_forward_pre_hook(lambda _, a, k, index=index: enters(index, a, k), with_kwargs=True)
            stack.callback(before.remove)
            stack.callback(block.register_forward_hook(lambda _, __, output: leaves(output)).remove)
        for module in model.modules():
            if id(module) not in inside:
                stack.callback(module.register_forward_pre_hook(lambda module, _: called(module)).remove)
        yield


@contextmanager
def _traceable(model: nn.Module) -> Iterator[None]:
    """Lets autograd see every parameter, also frozen ones and those in blocks with reentrant checkpointing."""
    frozen = [each for each in model.parameters() if not each.requires_grad and (each.is_floating_point() or each.is_complex())]
    flags = [vars(module) for module in model.modules() if vars(module).get("gradient_checkpointing") is True]
    for parameter in frozen:
        parameter.requires_grad_(True)
    for flag in flags:
        flag["gradient_checkpointing"] = False
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for flag in flags:
            flag["gradient_checkpointing"] = True
