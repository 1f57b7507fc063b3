"""Builds a model that is given by functions: on meta, so that it takes no memory, whatever its size."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._pytree import tree_leaves

from elastic.engine import randomness
from elastic.engine.deferred.recipe import Recipe
from elastic.engine.deferred.recording import Tape, recording
from elastic.engine.model import refuse_lazy
from elastic.errors import TrainerError
from elastic.layout.regions import BLOCK
from elastic.memory.tensors import hollow

Built: TypeAlias = "nn.Module | Sequence[nn.Module]"
Builder: TypeAlias = Callable[[], Built]

_WHOLE = "or give the Trainer the model itself instead of a function, so that every worker builds it"


def is_deferred(model: Any) -> bool:
    """Returns whether a model is given by functions that build it."""
    if isinstance(model, nn.Module):
        return False
    if not isinstance(model, list | tuple):
        return callable(model)
    made = [isinstance(each, nn.Module) for each in model]
    if any(made) and not all(made) and all(map(callable, model)):
        place = made.index(not made[0])
        raise TrainerError(
            f"model: layer 0 is a {'module' if made[0] else 'function'}, and layer {place} is not: give all layers as modules, or all as "
            "functions that build them"
        )
    return bool(model) and not made[0] and all(map(callable, model))


def build(model: Builder | Sequence[Builder], seed: int) -> tuple[Built, Recipe]:
    """Calls the functions, and returns the model on meta, and the recipe of its initial values. Generators are keyed by the seed meanwhile.

    Raises:
        TrainerError: if the model cannot be built without values, or a tensor in it would stay without.
    """
    tape = Tape()
    with randomness.kept():
        randomness.seed_all("build", seed)
        built = _built(tape, model)
    root = built if isinstance(built, nn.Module) else nn.ModuleList(built)
    refuse_lazy(root)
    _refuse_versions(tape)
    layers = list(root) if isinstance(root, nn.Sequential | nn.ModuleList) else [root]
    where = {id(tensor): index for index, layer in reversed([*enumerate(layers)]) for _, tensor in _tensors(layer)}
    named = dict(_tensors(root))
    _refuse_aliases(tape, root)
    places = {
        name: (tape.ref(tensor) if tensor.is_meta else tape.constant(tensor), where.get(id(tensor), 0))
        for name, tensor in named.items()
        if tensor.is_meta or _is_later(tensor) or _is_packed(tensor)
    }
    return built, Recipe(tape, places, seed)


def _built(tape: Tape, model: Builder | Sequence[Builder]) -> Built:
    pretrained: dict[int, Any] = {}

    def seen(module: nn.Module, _name: str, _submodule: nn.Module | None) -> None:
        if callable(getattr(module, "initialize_weights", None)) and callable(getattr(module, "_init_weights", None)):
            pretrained[id(module)] = module

    hook = register_module_module_registration_hook(seen)
    try:
        found = _called(tape, model)
    finally:
        hook.remove()
    inside = {id(part) for module in pretrained.values() for part in module.modules() if part is not module}
    for number, module in pretrained.items():
        if number not in inside:  # models of transformers skip this on meta
            with recording(tape, on_meta=False), torch.no_grad():
                module.initialize_weights()
    return found


def _called(tape: Tape, model: Builder | Sequence[Builder]) -> Built:
    functions: Sequence[Any] = model if isinstance(model, list | tuple) else [model]
    found = []
    for number, function in enumerate(functions):
        what = f"the function that builds layer {number}" if isinstance(model, list | tuple) else "the function that builds the model"
        try:
            with recording(tape):
                made = function()
        except TrainerError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise TrainerError(
                f"{what} fails on torch's meta device, where tensors have no values ({type(error).__name__}: {error}). Leave out what "
                f"depends on values, {_WHOLE}"
            ) from error
        if not isinstance(made, nn.Module) and (isinstance(model, list | tuple) or not isinstance(made, list | tuple)):
            raise TrainerError(
                f"{what} returned a {type(made).__name__}; it must return an nn.Module"
                + ("" if isinstance(model, list | tuple) else ", or a list of them (its layers in order)")
            )
        found.append(made)
    return found if isinstance(model, list | tuple) else found[0]


def _tensors(root: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from root.named_parameters()
    yield from root.named_buffers()


def _refuse_versions(tape: Tape) -> None:
    if any(tensor._version != version for tensor, version in tape.constants):
        raise TrainerError(
            "the function that builds the model changes a tensor in place that it has given to a parameter before, so initial values "
            f"cannot be computed later: copy it first, {_WHOLE}"
        )


def _refuse_aliases(tape: Tape, root: nn.Module) -> None:
    seen: dict[int, str] = {}
    for name, parameter in root.named_parameters():
        if parameter.numel() and (other := seen.setdefault(tape.ref(parameter).storage, name)) != name:
            raise TrainerError(
                f"{other} and {name} share memory but are not one object, so training would untie them: use the same nn.Parameter in both "
                "places (or compute one from the other in forward, as in `functional.linear(x, self.weight.t())`)"
            )


def replace(root: nn.Module, value: Callable[[str], torch.Tensor]) -> None:
    """Puts tensors that can be computed with in the place of those on meta; one for each, however often it is used.

    Parameters and buffers of packed weights are tensors without memory; all others get what `value(name)` returns.

    Raises:
        TrainerError: for a tensor on meta that is neither a parameter nor a buffer.
    """
    known = {id(tensor): name for name, tensor in _tensors(root) if tensor.is_meta or _is_later(tensor) or _is_packed(tensor)}
    originals = [tensor for _, tensor in _tensors(root)]  # alive, so that no other tensor gets the address of one
    made: dict[int, torch.Tensor] = {}

    def instead(tensor: torch.Tensor, *, saved: bool) -> torch.Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = _stand_in(known[id(tensor)], tensor, value, saved=saved)
        return made[id(tensor)]

    for path, module in root.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) in known:
                    saved = tensors is module._parameters or name not in module._non_persistent_buffers_set
                    tensors[name] = instead(tensor, saved=saved)  # pyright: ignore[reportArgumentType]
        for attribute, held in vars(module).items():
            if attribute not in ("_parameters", "_buffers", "_modules"):
                _refuse_attribute(path, module, attribute, held, known)
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
    del originals


def _stand_in(name: str, tensor: torch.Tensor, value: Callable[[str], torch.Tensor], *, saved: bool) -> torch.Tensor:
    if not isinstance(tensor, nn.Parameter):
        return hollow(tensor.shape, tensor.dtype) if saved and _is_packed(tensor) else value(name)
    later = _is_later(tensor)
    with torch.no_grad() if not later else nullcontext():
        found = nn.Parameter(hollow(tensor.shape, tensor.dtype) if later else value(name), requires_grad=tensor.requires_grad)
    vars(found).update(vars(tensor))
    return found


def _is_later(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor is a parameter that only workers with its layer have memory for."""
    plain = isinstance(tensor, nn.Parameter) and (tensor.requires_grad or type(tensor) is nn.Parameter)
    return plain and tensor.layout == torch.strided and tensor.numel() > (0 if tensor.requires_grad else 1)


def _is_packed(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor is a large buffer of bytes, such as packed weights."""
    plain = type(tensor) is torch.Tensor and tensor.layout == torch.strided and not tensor.is_quantized
    return plain and tensor.element_size() == 1 and tensor.numel() >= BLOCK


def _refuse_attribute(path: str, module: nn.Module, attribute: str, value: Any, known: Container[int]) -> None:
    if attribute.startswith("_flat_weight"):
        return  # of torch's recurrent layers, made again
    if any(isinstance(each, torch.Tensor) and (each.is_meta or id(each) in known) for each in tree_leaves(value)):
        raise TrainerError(
            f"attribute {attribute!r} of {path or 'the model'} ({type(module).__name__}) is a tensor that is neither a parameter nor a "
            f"buffer, and would stay without values: use register_buffer (persistent=False keeps it out of checkpoints), {_WHOLE}"
        )
