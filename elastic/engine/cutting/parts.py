"""The layers that a model is cut into: what comes before its blocks, each block, and what comes behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from elastic.engine.cutting.body import Body
from elastic.engine.cutting.forwarding import Forwarding
from elastic.engine.cutting.tracing import Trace
from elastic.engine.cutting.wiring import Wiring, call, part_of


class Owned(nn.Module):
    """Stands in a layer for a module of the model: the same parameters and buffers, or some of them, without its submodules."""

    def __init__(self, module: nn.Module | None = None, *, parameters: bool = True, buffers: bool = True) -> None:
        super().__init__()
        if module is not None and parameters:
            self._parameters = module._parameters
        if module is not None and buffers:
            self._buffers = module._buffers
            self._non_persistent_buffers_set = module._non_persistent_buffers_set


class _End(nn.Module):
    """A layer that runs a part of the model's own forward. Its mode is that of the modules around the blocks, which are in no layer."""

    _forwarding: Forwarding | None = None

    @property
    def training(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the model is in training mode."""
        return self._forwarding is None or self._forwarding.training

    @training.setter
    def training(self, mode: bool) -> None:
        if self._forwarding is not None:
            self._forwarding.training = mode


class First(_End):
    """The model up to its blocks: from its inputs to the state of the first block, and the arguments that all blocks get."""

    _forwarding: Forwarding

    def __init__(self, forwarding: Forwarding, wiring: Wiring) -> None:
        super().__init__()
        self._forwarding, self._wiring = forwarding, wiring

    def forward(self, inputs: Any, /) -> dict[str, Any]:
        """Returns `state`, `passed` (see `Wiring.pack`) and `inputs`."""
        calls = self._forwarding.before(inputs)
        state = {name: calls[0][name] for name in self._wiring.carried}
        return {"state": state, "passed": self._wiring.pack(calls), "inputs": inputs}


class Block(nn.Module):
    """One block of the model."""

    def __init__(self, path: str, block: nn.Module, index: int, wiring: Wiring) -> None:
        super().__init__()
        put(self, path, block)
        self._path, self._index, self._wiring = path, index, wiring
        self._last = index == len(wiring.fixed) - 1

    def forward(self, value: Mapping[str, Any], /) -> dict[str, Any]:
        """Returns what it got, with the state after the block; the last one returns its `output` and the model's inputs."""
        passed = {key: self._settled(key, each) for key, each in value["passed"].items()}
        positional, keywords = call({**value["state"], **self._wiring.unpack(self._index, passed)})
        output = self.get_submodule(self._path)(*positional, **keywords)
        if self._last:
            return {"output": output, "inputs": value["inputs"]}
        state = {name: part_of(output, part) for name, part in self._wiring.carried.items()}
        return {"state": state, "passed": passed, "inputs": value["inputs"]}

    def _settled(self, key: str, value: Any) -> Any:
        """Returns a passed argument, detached if no gradient belongs to it: recomputation gives one to every tensor that crosses."""
        return detached(value) if key.partition("@")[0] in self._wiring.constant else value


class Last(_End):
    """The model behind its blocks: from the output of the last one to the model's own."""

    _forwarding: Forwarding

    def __init__(self, forwarding: Forwarding) -> None:
        super().__init__()
        self._forwarding = forwarding

    def forward(self, value: Mapping[str, Any], /) -> Any:
        """Returns the model's output."""
        return self._forwarding.behind(value["inputs"], value["output"])


def detached(value: Any) -> Any:
    """Returns a value with its tensors detached."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, dict):
        return type(value)(**{name: detached(item) for name, item in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(detached, value))
    if isinstance(value, tuple | list):
        return type(value)(map(detached, value))
    return value


def put(layer: nn.Module, path: str, module: nn.Module) -> None:
    """Registers a module in a layer under its name in the model."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in layer._modules:
            layer.add_module(parent, Owned())
        layer = layer._modules[parent]  # type: ignore[assignment]
    layer.add_module(name, module)


def divide(model: nn.Module, body: Body, trace: Trace, first: First, last: Last) -> None:
    """Registers what lies outside of the blocks in the first layer, in the last, or in both.

    A module belongs to the layer that calls it, with all that it contains; one that none calls, to the last. A parameter on which a layer's
    result depends, but which lies in no module of it, belongs to that layer too.
    """
    inside = {id(module) for block in body.blocks for module in block.modules()}
    holds = {id(module) for module in model.modules() if any(id(each) in inside for each in module.modules())} - inside

    def called(module: nn.Module, calls: set[int]) -> bool:
        return any(id(each) in calls for each in module.modules())

    def visit(path: str, module: nn.Module, register: Callable[[nn.Module, str, nn.Module], None]) -> None:
        if id(module) in inside:
            return
        if id(module) in holds:
            for name, child in module.named_children():
                visit(f"{path}.{name}" if path else name, child, register)
            return
        before, behind = called(module, trace.modules_before), called(module, trace.modules_behind)
        if before:
            register(first, path, module)
        if behind or not before:
            register(last, path, module)

    visit("", model, put)
    for path, module in model.named_modules():
        if id(module) in holds and (module._parameters or module._buffers):
            uses = {id(each) for each in module._parameters.values() if each is not None}
            if uses & trace.before or module._buffers:
                put(first, f"{path}._own" if path else "_own", Owned(module, parameters=bool(uses & trace.before)))
            if uses & trace.behind or (uses and not uses & trace.before):
                put(last, f"{path}._own" if path else "_own", Owned(module, buffers=False))
    for layer, used in ((first, trace.before), (last, trace.behind)):
        own = {id(parameter) for parameter in layer.parameters()}
        for path, module in model.named_modules():
            rest = {id(each) for each in module._parameters.values() if each is not None} & used - own
            if rest:
                put(layer, f"{path}._used", Owned(module, buffers=False))
                own |= rest
