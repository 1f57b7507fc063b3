"""A Trainer's model if it is given by functions: built on every worker without memory for its trained parameters."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from elastic.engine.cutting.layers import as_layers
from elastic.engine.deferred.building import Builder, build, is_deferred, replace
from elastic.engine.initial import Computed, InitialValues, Renamed
from elastic.engine.model import split
from elastic.errors import TrainerError
from elastic.memory.tensors import copy
from elastic.worker.naming import Names, naming_of
from elastic.worker.weights import Weights


def model_of(
    model: nn.Module | Sequence[nn.Module] | Builder | Sequence[Builder],
    optimizer: Any,
    seed: int,
    weights: str | os.PathLike[str] | None,
    names: Names | None,
    load: Callable[[], Any],
    *,
    warn: bool,
) -> tuple[Any, InitialValues | None]:
    """Returns a model as modules, and where its initial values come from: None if they are in it.

    A model of transformers is cut into layers, whether it is given or built by a function; `load` returns a micro-batch.

    Raises:
        TrainerError: if the functions do not build a model that can be initialised later, or if the optimizer is no function then; or if
            `weights` are given for a model that has values.
        CheckpointError: if the weights cannot be read, or do not fit the model.
    """
    if not is_deferred(model):
        if weights is not None:
            raise TrainerError(
                f"weights={os.fspath(weights)!r} is given with a model that has values already: give the function that builds the model, "
                "so that each worker reads its own layers; or load the weights into the model, and leave out weights="
            )
        return as_layers(model, load), None
    if isinstance(optimizer, Optimizer):
        raise TrainerError(
            f"optimizer is a {type(optimizer).__name__}, but the model is given by a function, so its parameters exist only later: give a "
            "function that makes the optimizer from them, such as `lambda parameters: torch.optim.AdamW(parameters)`"
        )
    built, recipe = build(model, seed)  # pyright: ignore[reportArgumentType]
    root = split(built)[0]
    initial = Computed(recipe) if weights is None else Weights(weights, root, naming_of(root, names), recipe, warn=warn)
    replace(root, initial.value)
    layers = as_layers(built, load)
    if layers is built:
        return built, initial
    before = {id(tensor): name for name, tensor in [*root.named_parameters(), *root.named_buffers()]}
    now = [*layers.named_parameters(), *layers.named_buffers()]
    return layers, Renamed(initial, {name: before[id(tensor)] for name, tensor in now if id(tensor) in before})


def compact_state(optimizer: Optimizer) -> None:
    """Replaces state that an optimizer makes when it is made (Adagrad's) by tensors that hold one element.

    Raises:
        TrainerError: if the elements of such a state differ, so that every worker would need all of it.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if not isinstance(value, torch.Tensor) or value.shape != parameter.shape or value.numel() < 2:
                continue
            first = value.reshape(-1)[0]
            if not bool((value == first).all()):
                raise TrainerError(
                    f"{type(optimizer).__name__} makes its state {name!r} of each parameter from the values that this one has when the "
                    "optimizer is made, but a model that is given by a function has none then: give the Trainer the model itself"
                )
            state[name] = copy(first).expand(value.shape)
