"""A user's model as layers over flat vectors: the place of each parameter, and the layers that this worker holds."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from elastic.engine.buffers import Running
from elastic.engine.determinism import relax
from elastic.engine.initial import InitialValues
from elastic.engine.partial import note_whole, partial
from elastic.engine.unchanged import ChangeWatch, saved_buffers
from elastic.errors import TrainerError
from elastic.layout.regions import (
    BLOCK,
    ITEMSIZE,
    MASTER,
    PARAM,
    SAME,
    TRAINED,
    CutRule,
    LayerSpec,
    ModelSpec,
    ParameterSpec,
    Tie,
    align,
)
from elastic.layout.runs import shared
from elastic.memory import device
from elastic.memory.raw import give_back
from elastic.memory.tensors import bytes_of, contiguous, copy, empty, is_hollow, lasting

_LEAST = BLOCK
"""Elements. Smaller buffers that are not trained are on every worker: they may be constants that code outside of layers reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vector:
    """The gradient that one layer's backward fills: the layer's own vector, or one tied parameter of a lower layer.

    `start` and `stop` are elements of layer `home`'s vector; every parameter lies at `spec.start - start` in the gradient buffer.
    """

    id: int
    layer: int
    home: int
    start: int
    stop: int
    parameters: tuple[ParameterSpec, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start


def vectors(spec: ModelSpec) -> tuple[Vector, ...]:
    """Returns all gradient vectors of a model, in layer order, each layer's own before its ties."""
    found: list[Vector] = []
    for layer in spec.layers[: spec.depth]:
        for part in (spec.layers[each] for each in spec.parts[layer.index]):
            if part.size and not part.frozen:
                run = {"start": 0, "stop": part.size}
                found.append(Vector(id=len(found), layer=layer.index, home=part.index, parameters=part.parameters, **run))
        for tie in layer.ties:
            if spec.layers[tie.home].frozen:
                continue
            parameter = spec.layers[tie.home].parameter(tie.name)
            run = {"start": parameter.start, "stop": align(parameter.stop)}
            found.append(Vector(id=len(found), layer=layer.index, home=tie.home, parameters=(parameter,), **run))
    return tuple(found)


def split(model: nn.Module | Sequence[nn.Module]) -> tuple[nn.Module, tuple[nn.Module, ...]]:
    """Returns the root module, which names parameters, and the layers in order.

    An `nn.Sequential` or a list of modules is a list of layers; any other module is one layer.
    """
    if isinstance(model, nn.Sequential | nn.ModuleList):
        layers = tuple(model)
        root: nn.Module = model
    elif isinstance(model, nn.Module):
        layers, root = (model,), model
    elif isinstance(model, list | tuple) and all(isinstance(layer, nn.Module) for layer in model):
        layers = tuple(model)
        root = nn.ModuleList(model)
    else:
        raise TrainerError(f"model must be an nn.Module or a list of them (its layers in order), not {type(model).__name__}")
    if not layers:
        raise TrainerError("the model has no layers")
    refuse_lazy(root)
    return root, layers


def refuse_lazy(root: nn.Module) -> None:
    """Raises TrainerError for a parameter whose shape is not known yet, as those of `nn.LazyLinear`."""
    for name, tensor in root.named_parameters():
        if isinstance(tensor, UninitializedParameter):
            raise TrainerError(
                f"parameter {name} has no shape yet, since a lazy module finds it in its first forward: use the module that is not lazy "
                "(such as nn.Linear instead of nn.LazyLinear), or run the model once on a micro-batch before it is given to the Trainer"
            )


def refuse_aliases(root: nn.Module) -> None:
    """Refuses trainable parameters that share memory without being one object: each gets memory of its own, so views would break.

    Raises:
        TrainerError: naming two of them.
    """
    named = [*root.named_parameters(), *root.named_buffers()]
    places = sorted(
        (*_place(tensor), name, tensor.requires_grad) for name, tensor in named if tensor.layout == torch.strided and tensor.numel()
    )
    last: tuple[int, int, str, bool] | None = None  # the one that ends last so far, among all and (`trained`) among trainable ones
    trained: tuple[int, int, str, bool] | None = None
    for place in places:
        other = (last if place[3] else trained) or (0, 0, "", False)
        if place[0] < other[1]:
            raise TrainerError(
                f"{other[2]} and {place[2]} share memory but are not one object, so training would untie them: use the same "
                "nn.Parameter in both places (or compute one from the other in forward, as in `functional.linear(x, self.weight.t())`)"
            )
        last = place if last is None or place[1] > last[1] else last
        if place[3]:
            trained = place if trained is None or place[1] > trained[1] else trained


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    """Returns the first and the last address of its elements."""
    reach = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()


Described = tuple[str, tuple[int, ...], str]
"""A tensor's name, shape and dtype."""


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _described(name: str, tensor: torch.Tensor) -> Described:
    return name, tuple(tensor.shape), _dtype_name(tensor)


def _movable(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor that is not trained is plain memory, which can be moved between workers."""
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_quantized
    return plain and _dtype_name(tensor) in ITEMSIZE and tensor.device == device.current() and tensor.numel() > 0


class LayeredModel:
    """Owns the memory of the parameters of the layers that this worker holds.

    Every worker builds the whole model once; `hold` then lays the held layers out as flat vectors and frees the others. With `initial`
    values, trained parameters have been built without memory, and get it in `hold`.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        *,
        cut: CutRule = "block",
        masters: bool = False,
        exact: bool = True,
        initial: InitialValues | None = None,
    ) -> None:
        self.initial = initial
        self.root, self.layers = split(model)
        self.running = Running(self.root, self.layers)
        if not exact:
            relax()
            self.running.loosen(saved_buffers(self.root))
        self.running.record(-1)
        self.watch = ChangeWatch(self.root, self.running, exact=exact)
        self._names = {id(parameter): name for name, parameter in self.root.named_parameters()}
        self._parameters = dict(self.root.named_parameters())
        self.frozen = tuple(name for name, parameter in self._parameters.items() if not parameter.requires_grad)
        refuse_aliases(self.root)
        buffers = self._movable_buffers()
        self._names |= {id(buffer): name for name, buffer in buffers.items()}
        self._tensors: dict[str, torch.Tensor] = {**self._parameters, **buffers}
        note_whole(self._tensors.values())
        self.spec = ModelSpec(layers=self._describe_all({*buffers}), cut=cut, masters=masters)
        self._placed = {parameter.name: (layer.index, parameter) for layer in self.spec.layers for parameter in layer.parameters}
        self.vectors = vectors(self.spec)
        self._materialise()
        self.flats: dict[int, torch.Tensor] = {}
        self.whole = True  # all initial values can be had here: until the first `hold`, or always if they come from `initial`
        self.tied: dict[tuple[int, int], torch.Tensor] = {}

    def _materialise(self) -> None:
        """Gives values to tensors that were built without memory, and that every worker has to have."""
        if self.initial is None:
            return
        everywhere = [(name, each) for name, each in [*self._parameters.items(), *self.root.named_buffers()] if name not in self._placed]
        hollow = [(name, each) for name, each in everywhere if self.initial.digest(name) is not None and is_hollow(each)]
        for name, tensor in hollow:
            tensor.data = self.initial.value(name)
        if hollow:
            self.watch.renew()

    def _movable_buffers(self) -> dict[str, torch.Tensor]:
        """Returns the buffers that only workers with their layer need: those in the state_dict that are large, and that nothing changes."""
        saved = set(saved_buffers(self.root)).difference(self.running.names)
        return {name: each for name, each in self.root.named_buffers() if name in saved and each.numel() >= _LEAST and _movable(each)}

    def _describe_all(self, buffers: set[str]) -> tuple[LayerSpec, ...]:
        """Returns each module's own vector, of its first trained dtype, and behind all these the vectors of its other kinds of tensors."""
        homes: dict[int, int] = {}
        own: list[LayerSpec] = []
        others: list[tuple[int, tuple[bool, str], list[Described]]] = []
        pending: list[list[torch.Tensor]] = []
        for index, layer in enumerate(self.layers):
            kinds, ties = self._kinds(index, layer, buffers, homes)
            trained = [kind for kind in kinds if not kind[0]]
            chosen = kinds.pop(trained[0]) if trained else []
            own.append(LayerSpec.build(index, [_described(*each) for each in chosen], ties))
            for kind, found in kinds.items():
                others.append((index, kind, [_described(*each) for each in found]))
                pending.append([tensor for _, tensor in found])
        for number, tensors in enumerate(pending, len(own)):
            homes.update({id(tensor): number for tensor in tensors})
        placed = [replace(layer, ties=tuple(self._tie(tie.name, homes) for tie in layer.ties)) for layer in own]
        parts = [LayerSpec.build(number, found, (), module, frozen) for number, (module, (frozen, _), found) in enumerate(others, len(own))]
        return (*placed, *parts)

    def _tie(self, name: str, homes: Mapping[int, int]) -> Tie:
        return Tie(name=name, home=homes[id(self._tensors[name])])

    def _kinds(
        self, index: int, layer: nn.Module, buffers: set[str], homes: dict[int, int]
    ) -> tuple[dict[tuple[bool, str], list[tuple[str, torch.Tensor]]], list[Tie]]:
        """Returns a module's tensors that no lower one has, by whether they are frozen and dtype; and those that a lower one has."""
        kinds: dict[tuple[bool, str], list[tuple[str, torch.Tensor]]] = {}
        ties: list[Tie] = []
        for tensor in [*layer.parameters(), *(each for each in layer.buffers() if self._names.get(id(each)) in buffers)]:
            if not self._is_placed(tensor):
                continue
            name = self._names[id(tensor)]
            if id(tensor) in homes:
                ties.append(Tie(name=name, home=homes[id(tensor)]))
            else:
                homes[id(tensor)] = index
                kinds.setdefault((not tensor.requires_grad, _dtype_name(tensor)), []).append((name, tensor))
        return kinds, ties

    def _is_placed(self, tensor: torch.Tensor) -> bool:
        """Returns whether a tensor lies in a vector. Raises TrainerError for one that cannot be trained."""
        if not tensor.requires_grad:
            return _movable(tensor)
        if _dtype_name(tensor) not in TRAINED or tensor.device != device.current():
            raise TrainerError(
                f"parameter {self._names[id(tensor)]} is {tensor.dtype} on {tensor.device}; only {', '.join(TRAINED)} on "
                f"{device.current()} can be trained"
            )
        return True

    def is_placed(self, name: str) -> bool:
        """Returns whether a tensor lies in a vector: then only workers that need it have it. All others are on every worker."""
        return name in self._placed

    @property
    def placed_buffers(self) -> frozenset[str]:
        """The buffers that lie in vectors."""
        return frozenset(name for name in self._placed if name not in self._parameters)

    def parameter(self, name: str) -> nn.Parameter:
        """Returns the user's parameter object of that name."""
        return self._parameters[name]

    def name_of(self, parameter: torch.Tensor) -> str | None:
        """Returns the (canonical) name of one of the model's parameter objects; None for another tensor."""
        return self._names.get(id(parameter))

    @property
    def names(self) -> list[str]:
        """Every parameter's name, sorted; a tied parameter has one name."""
        return sorted(self._parameters)

    def layer_of(self, name: str) -> int | None:
        """Returns the vector that a tensor lies in; None for one that is on every worker."""
        home = self._placed.get(name)
        return None if home is None else home[0]

    def size_of(self, name: str) -> int:
        """Returns a parameter's size in bytes, whether it is held here or not."""
        if name in self._placed:
            _, spec = self._placed[name]
            return spec.size * spec.itemsize
        return self._parameters[name].nbytes

    def digest(self) -> str:
        """Returns the hex SHA-256 of names, shapes, dtypes and bytes of all parameters and buffers; equal on all workers at the start.

        Instead of the bytes of initial values that are computed later it contains what they follow from: nothing is computed or gathered.
        """
        total = hashlib.sha256()
        for name, tensor in sorted([*self._parameters.items(), *self.root.named_buffers()]):
            total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad}\n".encode())
            later = None if self.initial is None else self.initial.digest(name)
            total.update(bytes_of(contiguous(tensor)).data if later is None else later.encode())
        return total.hexdigest()

    def built_alike(self) -> dict[str, dict[str, str]]:
        """Returns what else must be equal on all workers if initial values are computed later: digests of layers."""
        if self.initial is None:
            return {}
        found: dict[str, str] = {}
        for index, layer in enumerate(self.layers):
            total = hashlib.sha256(re.sub("0x[0-9a-f]+", "", repr(layer)).encode())
            for tensor in [*layer.parameters(), *layer.buffers()]:
                name = self._names.get(id(tensor))
                total.update(str(None if name is None else (name, self.initial.digest(name))).encode())
            found[f"layer {index}"] = total.hexdigest()[:16]
        return {"initial": found}

    def state_dict(self, whole: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the model's state_dict with the tensors of `whole` as trained parameters; everything else in it is copied from here."""
        found: dict[str, torch.Tensor] = {}
        with partial():
            for key, tensor in self.root.state_dict(keep_vars=True).items():
                name = self._names.get(id(tensor), "")
                found[key] = whole[name] if name in whole else copy(tensor.detach())
        return found

    def bytes_of(self, name: str) -> np.ndarray:
        """Returns a held parameter's bytes, row-major (uint8, shares memory where possible)."""
        return bytes_of(contiguous(self._parameters[name]))

    def dtype(self, layer: int, state: str = PARAM, dtype: str = SAME) -> torch.dtype:
        """Returns the dtype of a layer's vector, or of another state of it, which is `dtype` if that is not `SAME`."""
        return getattr(torch, self.spec.dtype(layer, state, dtype))

    def state_dtypes(self) -> dict[int, torch.dtype]:
        """Returns for each layer what `SAME` stands for as the dtype of an optimizer state."""
        return {layer.index: self.dtype(layer.index, MASTER) for layer in self.spec.layers if layer.size}

    def trained(self, module: int) -> tuple[int, float]:
        """Returns the elements of a module's trained tensors, padding included, and the mean bytes of one."""
        vectors = [self.spec.layers[part] for part in self.spec.parts[module] if part not in self.spec.frozen]
        elements = sum(each.size for each in vectors)
        total = sum(each.size * self.dtype(each.index).itemsize for each in vectors if each.size)
        return elements, 0 if not elements else total // elements if not total % elements else total / elements

    def frozen_bytes(self, module: int) -> int:
        """Returns the bytes of a module's tensors that lie in vectors and are not trained."""
        vectors = [self.spec.layers[part] for part in self.spec.parts[module]]
        return sum(each.size * self.dtype(each.index).itemsize for each in vectors if each.frozen)

    def hold(self, layers: Iterable[int], *, keep: bool = True, reuse: Mapping[int, torch.Tensor] | None = None) -> None:
        """Lays the given layers out as flat vectors and frees the memory of trainable parameters of all others.

        With `keep` their values are kept, else the caller fills them in; layers in `reuse` use the given vectors. Earlier flat vectors stay
        valid for other holders of a reference.
        """
        held = sorted(layers)
        given = reuse or {}
        flats = {index: given[index] if index in given else self._flatten(index, keep) for index in held if self.spec.layers[index].size}
        tied = {
            (home, start): self._pack((self._at(home, start),), start, stop, keep)
            for index in held
            for home, start, stop in self.spec.tied_runs(index)
            if home not in flats
        }
        self.flats, self.tied, self.whole = flats, tied, self.initial is not None
        for layer in self.spec.layers:
            for parameter in layer.parameters:
                memory, offset = self._memory(layer.index, parameter)
                target = self._tensors[parameter.name]
                target.grad = None
                if memory is None:
                    target.data = empty(parameter.shape if parameter.size == 0 else 0, target.dtype)
                else:
                    target.data = memory[parameter.start - offset : parameter.stop - offset].view(parameter.shape)
        self.watch.moved(self._placed)

    def values(self, layer: int, start: int, stop: int) -> torch.Tensor:
        """Returns a copy of a run of a layer's vector with initial values; only while this worker has or can compute them (`whole`)."""
        spec = self.spec.layers[layer]
        flat = lasting(stop - start, self.dtype(layer))
        for parameter in spec.parameters:
            if both := shared((parameter.start, parameter.stop), (start, stop)):
                first, last = both
                self._begin(parameter, first - parameter.start, flat[first - start : last - start])
        return flat

    def _begin(self, parameter: ParameterSpec, start: int, run: torch.Tensor) -> None:
        """Fills flat memory with a parameter's initial values, from element `start` on."""
        if self.initial is not None:
            self.initial.fill(parameter.name, start, run)
        else:
            run[:] = self._tensors[parameter.name].detach().reshape(-1)[start : start + run.numel()]

    @contextmanager
    def lent(self, layer: int) -> Iterator[None]:
        """Gives a layer's parameters memory during the block, if they have none yet, with values like the initial ones."""
        tensors = [*self.layers[layer].parameters(), *self.layers[layer].buffers()]
        waiting = [each for each in tensors if self.initial is not None and self._names.get(id(each)) in self._placed]
        before = [each.data for each in waiting]
        for each in waiting:
            each.data = self.initial.sample(self._names[id(each)]) if self.initial is not None and each.numel() else each.data
        try:
            yield
        finally:
            for each, nothing in zip(waiting, before, strict=True):
                each.data, each.grad = nothing, None
            if waiting:
                give_back()

    @property
    def built_bytes(self) -> int:
        """Bytes of parameters that lie in memory before the first `hold`."""
        return sum(each.nbytes for name, each in self._tensors.items() if self.initial is None or name not in self._placed)

    def run(self, layer: int, start: int, stop: int) -> torch.Tensor:
        """Returns the memory of the run `[start, stop)` of a layer's parameters, in the flat vector or in a tied copy. Raises KeyError."""
        if layer in self.flats:
            return self.flats[layer][start:stop]
        for (home, first), memory in self.tied.items():
            if home == layer and first <= start and stop <= first + memory.numel():
                return memory[start - first : stop - first]
        raise KeyError(f"this worker does not hold run [{start}, {stop}) of layer {layer}")

    def _memory(self, layer: int, parameter: ParameterSpec) -> tuple[torch.Tensor | None, int]:
        if layer in self.flats:
            return self.flats[layer], 0
        return self.tied.get((layer, parameter.start)), parameter.start

    def _at(self, layer: int, start: int) -> ParameterSpec:
        return next(parameter for parameter in self.spec.layers[layer].parameters if parameter.start == start)

    def _flatten(self, index: int, keep: bool) -> torch.Tensor:
        return self._pack(self.spec.layers[index].parameters, 0, self.spec.layers[index].size, keep)

    def _pack(self, parameters: Iterable[ParameterSpec], start: int, stop: int, keep: bool) -> torch.Tensor:
        parameters = tuple(parameters)
        flat = lasting(stop - start, getattr(torch, parameters[0].dtype))
        for parameter in parameters if keep else ():
            self._begin(parameter, 0, flat[parameter.start - start : parameter.stop - start])
        return flat
