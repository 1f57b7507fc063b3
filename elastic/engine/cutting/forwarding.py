"""Runs parts of a model's own forward, with its blocks replaced by stand-ins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from elastic.engine import randomness
from elastic.engine.cutting.body import WAYS, Body
from elastic.engine.cutting.wiring import Arguments, Wiring, named, part_of
from elastic.errors import TrainerError
from elastic.memory import device
from elastic.memory.tensors import zeros

Forward = Callable[..., Any]


class _Reached(BaseException):
    """The model's forward has called its last block. Not an Exception: the forward must not catch it."""


class Forwarding:
    """A model's forward before its blocks, and behind them. `inputs` are its keyword arguments, or one positional argument alone."""

    def __init__(self, model: nn.Module, body: Body, wiring: Wiring, last_output: Any) -> None:
        self._model, self._body, self._wiring = model, body, wiring
        self._shape = last_output  # structure of a block's output, with None for what is no part of the state
        self._around, self._containers = _outside(model, body)
        self._foreign: list[tuple[dict[str, Any], str, torch.Size, torch.dtype]] = []

    @property
    def training(self) -> bool:
        """Whether the modules around the blocks are in training mode."""
        return self._model.training

    @training.setter
    def training(self, mode: bool) -> None:
        for module in self._containers:
            module.training = mode

    def own(self, parameters: Iterable[nn.Parameter]) -> None:
        """States the parameters of the last layer. It has zeros in place of all others."""
        own = {id(parameter) for parameter in parameters}
        self._foreign = [
            (module._parameters, name, parameter.shape, parameter.dtype)
            for module in self._around
            for name, parameter in module._parameters.items()
            if parameter is not None and id(parameter) not in own
        ]

    def before(self, inputs: Any) -> list[Arguments]:
        """Returns the arguments of each block. Raises TrainerError if a micro-batch takes another way through the model."""
        calls: list[Arguments] = []
        try:
            with without_cache(self._model), stand_ins(self._body.blocks, self._stand_ins(calls, None)):
                invoke(self._model, inputs)
        except _Reached:
            return calls
        raise self._strays(f"calls {len(calls)} of its {len(self._body.blocks)} blocks")

    def behind(self, inputs: Any, output: Any) -> Any:
        """Returns the model's output, from that of its last block."""
        calls: list[Arguments] = []
        state, graph = randomness.torch_states(), torch.is_grad_enabled()

        def resume() -> Any:
            torch.set_grad_enabled(graph)
            torch.default_generator.set_state(state[0])
            if len(state) > 1:
                device.set_generator_state(state[1])
            return output

        try:
            with without_cache(self._model), _zeros(self._foreign), stand_ins(self._body.blocks, self._stand_ins(calls, resume)):
                torch.set_grad_enabled(False)
                return invoke(self._model, inputs)
        finally:
            torch.set_grad_enabled(graph)

    def _stand_ins(self, calls: list[Arguments], resume: Callable[[], Any] | None) -> list[Forward]:
        returned: list[dict[str, Any]] = []
        last = len(self._body.blocks) - 1

        def forward(block: int, *positional: Any, **keywords: Any) -> Any:
            arguments = named(positional, keywords)
            if len(calls) != block:
                raise self._strays(f"calls {self._body.block_name(block)} behind {len(calls)} others")
            try:
                self._wiring.check(block, arguments)
            except ValueError as error:
                raise self._strays(str(error)) from error
            if block and any(arguments[name] is not value for name, value in returned[-1].items()):
                raise self._strays(f"does something between {self._body.block_name(block - 1)} and the next block")
            calls.append(arguments)
            if block == last and resume is None:
                raise _Reached
            if block == last:
                return resume()  # type: ignore[misc]
            output = self._output(arguments)
            returned.append({name: part_of(output, part) for name, part in self._wiring.carried.items()})
            return output

        return [lambda *a, block=block, **k: forward(block, *a, **k) for block in range(last + 1)]

    def _output(self, arguments: Arguments) -> Any:
        """Returns something that looks like a block's output: new tensors, by which the next block's arguments are known."""
        parts = {part: arguments[name] for name, part in self._wiring.carried.items()}
        known = next(value for value in arguments.values() if isinstance(value, torch.Tensor))
        made = {part: (known if value is None else value).detach() for part, value in parts.items()}
        if None in made:
            return made[None]
        return type(self._shape)(made.get(place) for place in range(len(self._shape)))

    def _strays(self, what: str) -> TrainerError:
        return TrainerError(
            f"the forward of {type(self._model).__name__} {what}, so the layers that it was cut into would compute something else for this "
            f"micro-batch. If it leaves out blocks at random (layerdrop), set that to 0. {WAYS}"
        )


def _outside(model: nn.Module, body: Body) -> tuple[list[nn.Module], list[nn.Module]]:
    """Returns the modules outside of the blocks, and those of them that contain the blocks."""
    inside = {id(module) for block in body.blocks for module in block.modules()}
    found = [module for module in model.modules() if id(module) not in inside]
    return found, [module for module in found if any(id(each) in inside for each in module.modules())]


def invoke(model: nn.Module, inputs: Any) -> Any:
    """Calls a model with its inputs."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


@contextmanager
def stand_ins(blocks: Sequence[nn.Module], forwards: Sequence[Forward]) -> Iterator[None]:
    """Replaces the forward of each block."""
    before = [vars(block).get("forward") for block in blocks]
    for block, forward in zip(blocks, forwards, strict=True):
        vars(block)["forward"] = forward
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del vars(block)["forward"]
            else:
                vars(block)["forward"] = forward


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Sets `use_cache`, which is for generation, to False in the configurations of a model of transformers."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None}
    changed = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    for config in changed:
        config.use_cache = False
    try:
        yield
    finally:
        for config in changed:
            config.use_cache = True


@contextmanager
def _zeros(foreign: Sequence[tuple[dict[str, Any], str, torch.Size, torch.dtype]]) -> Iterator[None]:
    """Puts zeros, which take no memory, in the place of parameters."""
    kept = [parameters[name] for parameters, name, _, _ in foreign]
    made = {dtype: zeros((), dtype) for _, _, _, dtype in foreign}
    for parameters, name, shape, dtype in foreign:
        parameters[name] = made[dtype].expand(shape)
    try:
        yield
    finally:
        for (parameters, name, _, _), parameter in zip(foreign, kept, strict=True):
            parameters[name] = parameter
