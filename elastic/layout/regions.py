"""The coordinates of state: a model is a sequence of layers, and a layer is one flat vector of elements.

A layer's vector holds its trainable parameters in definition order, each starting at a multiple of `ALIGNMENT`. The padding after
a parameter belongs to the vector and is zero. Every state of an element (the parameter itself, each optimizer state) has the same
coordinate `(layer, position)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from typing import Any, Literal

from elastic.errors import LayoutError

ALIGNMENT = 64
"""Elements. Optimizers that round differently on vector tails are bit-equal under any cut at this alignment."""

BLOCK = 4096
"""Elements: the unit of cuts, digests and norms."""

TRAINED = ("float32", "float64", "bfloat16", "float16")
"""Dtypes of parameters that can be trained."""

_DTYPES_OF = {
    8: ("float64", "complex64", "int64", "uint64"),
    4: ("float32", "int32", "uint32"),
    2: ("bfloat16", "float16", "int16", "uint16"),
    1: ("int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
}

ITEMSIZE = {dtype: size for size, dtypes in _DTYPES_OF.items() for dtype in dtypes}
"""Bytes of one element, by dtype name. Frozen tensors may have any of them: they are bytes that nobody computes with."""

NARROW = ("bfloat16", "float16")
"""Dtypes of parameters that may have a float32 master."""

PARAM = "param"
"""The state that is the parameter itself. All other states are the optimizer's and follow ownership."""

MASTER = "fp32_master"
"""The state that is a parameter's float32 master: the optimizer updates it, and the parameter is its rounding."""

SAME = "same"
"""Stands for the dtype of a layer's masters or, without them, of its parameters, as the dtype of an optimizer state."""

CutRule = Literal["block", "tensor"]


def align(position: int) -> int:
    """Returns the lowest multiple of `ALIGNMENT` that is at least `position` (elements)."""
    return -(-position // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterSpec:
    """One trainable parameter: its global shape, dtype name and first position in its layer's vector (elements)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int

    def __post_init__(self) -> None:
        if self.dtype not in ITEMSIZE:
            raise LayoutError(f"parameter {self.name!r} has dtype {self.dtype!r}; known are {', '.join(ITEMSIZE)}")
        if self.start < 0 or self.start % ALIGNMENT:
            raise LayoutError(f"parameter {self.name!r} starts at {self.start}, which is not a multiple of {ALIGNMENT}")
        if any(extent < 0 for extent in self.shape):
            raise LayoutError(f"parameter {self.name!r} has a negative extent in its shape {self.shape}")

    @property
    def size(self) -> int:
        """Elements, without padding."""
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        """One past the last element; the padding up to `align(stop)` is not part of the parameter."""
        return self.start + self.size

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tie:
    """Parameter `name` of the lower-numbered layer `home`, used by another layer."""

    name: str
    home: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One layer's flat vector. Its size is 0 if it has no parameters.

    A vector has one dtype, and its parameters are trained or `frozen`. Of a layer's module that has several kinds, the others are vectors
    behind those of all modules, each `part_of` the module's own: they are held by the same workers.
    """

    index: int
    parameters: tuple[ParameterSpec, ...]
    ties: tuple[Tie, ...] = ()
    part_of: int | None = None
    frozen: bool = False

    def __post_init__(self) -> None:
        position = 0
        for parameter in self.parameters:
            if parameter.start != position:
                raise LayoutError(f"layer {self.index}: parameter {parameter.name!r} starts at {parameter.start} instead of {position}")
            position = align(parameter.stop)
        names = [parameter.name for parameter in self.parameters]
        if len(set(names)) < len(names):
            raise LayoutError(f"layer {self.index}: two parameters have the same name in {names}")
        for tie in self.ties:
            if tie.home < 0 or tie.home == self.index:
                raise LayoutError(f"layer {self.index}: the home of tied parameter {tie.name!r} is layer {tie.home}, not a lower one")

    @classmethod
    def build(
        cls,
        index: int,
        parameters: Iterable[tuple[str, Sequence[int], str]],
        ties: Iterable[Tie] = (),
        part_of: int | None = None,
        frozen: bool = False,
    ) -> LayerSpec:
        """Places the parameters `(name, shape, dtype)` one after the other, in the given order."""
        placed: list[ParameterSpec] = []
        position = 0
        for name, shape, dtype in parameters:
            placed.append(ParameterSpec(name=name, shape=tuple(shape), dtype=dtype, start=position))
            position = align(placed[-1].stop)
        return cls(index=index, parameters=tuple(placed), ties=tuple(ties), part_of=part_of, frozen=frozen)

    @property
    def module(self) -> int:
        """The number of the layer's module."""
        return self.index if self.part_of is None else self.part_of

    @property
    def title(self) -> str:
        """The words for the vector in messages: its module's number, and what it has of it if that is not all."""
        part = "" if self.part_of is None else f" ({'frozen ' if self.frozen else ''}{self.dtype} part)"
        return f"layer {self.module}{part}"

    @property
    def size(self) -> int:
        """Elements of the vector, padding included: a multiple of `ALIGNMENT`."""
        return align(self.parameters[-1].stop) if self.parameters else 0

    @property
    def dtype(self) -> str:
        """The name of the parameters' dtype; empty if the layer has none."""
        return self.parameters[0].dtype if self.parameters else ""

    def parameter(self, name: str) -> ParameterSpec:
        """The parameter called `name`; LayoutError if the layer has none."""
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        raise LayoutError(f"layer {self.index} has no parameter {name!r}")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """All layers in order, and the rule where their vectors may be cut between owners. `masters`: narrow parameters have a `MASTER`."""

    layers: tuple[LayerSpec, ...]
    cut: CutRule = "block"
    masters: bool = False

    def __post_init__(self) -> None:
        if self.cut not in ("block", "tensor"):
            raise LayoutError(f"cut is {self.cut!r}; it must be 'block' or 'tensor'")
        for position, layer in enumerate(self.layers):
            if layer.index != position:
                raise LayoutError(f"the layer at position {position} has index {layer.index}")
            if layer.part_of is not None and not (0 <= layer.part_of < self.depth <= position):
                raise LayoutError(f"layer {position} is a part of layer {layer.part_of}, and there are {self.depth} modules")
            for tie in layer.ties:
                home = self.layers[tie.home]
                home.parameter(tie.name)
                if home.module >= layer.index:
                    raise LayoutError(f"layer {layer.index}: the home of tied parameter {tie.name!r} is layer {tie.home}, not a lower one")

    @cached_property
    def depth(self) -> int:
        """The number of modules: the vectors behind are parts of these."""
        return sum(layer.part_of is None for layer in self.layers)

    @cached_property
    def parts(self) -> tuple[tuple[int, ...], ...]:
        """The numbers of each module's vectors, its own first."""
        found: list[list[int]] = [[] for _ in range(self.depth)]
        for layer in self.layers:
            found[layer.module].append(layer.index)
        return tuple(map(tuple, found))

    @cached_property
    def frozen(self) -> frozenset[int]:
        """The vectors that nothing changes."""
        return frozenset(layer.index for layer in self.layers if layer.frozen)

    def has_masters(self, layer: int) -> bool:
        """Whether a layer's parameters have masters."""
        return self.masters and self.layers[layer].dtype in NARROW and not self.layers[layer].frozen

    def has(self, layer: int, state: str) -> bool:
        """Whether a layer may have this state."""
        return state == PARAM or (not self.layers[layer].frozen and (state != MASTER or self.has_masters(layer)))

    def dtype(self, layer: int, state: str, dtype: str = SAME) -> str:
        """The dtype's name of a layer's state, which is `dtype` if that is not `SAME`."""
        if state != PARAM and dtype != SAME:
            return dtype
        return "float32" if state != PARAM and self.has_masters(layer) else self.layers[layer].dtype

    def cut_points(self, layer: int) -> Sequence[int]:
        """The ascending positions, 0 included, at which an interval of `layer` may start. It ends at one of these or at the layer's end.

        They are the multiples of `BLOCK`, or the starts of parameters for optimizers that need whole tensors.
        """
        spec = self.layers[layer]
        if self.cut == "block":
            return range(0, spec.size, BLOCK)
        return tuple(sorted({parameter.start for parameter in spec.parameters if parameter.start < spec.size}))

    def tied_runs(self, layer: int) -> tuple[tuple[int, int, int], ...]:
        """`(home, start, stop)` of every tied parameter that `layer` uses, with `stop` aligned up."""
        found = [(tie.home, self.layers[tie.home].parameter(tie.name)) for tie in self.layers[layer].ties]
        return tuple((home, parameter.start, align(parameter.stop)) for home, parameter in found)

    def to_json(self) -> dict[str, Any]:
        """Writes one description for all layers that differ only in the common prefix of their parameters' names."""
        forms: dict[str, int] = {}
        shared: list[list[list[Any]]] = []
        layers: list[list[Any]] = []
        for layer in self.layers:
            prefix = commonprefix([parameter.name for parameter in layer.parameters])  # noqa: RUF071 (characters are meant)
            form = [[p.name[len(prefix) :], p.dtype, *p.shape] for p in layer.parameters]
            number = forms.setdefault(repr(form), len(forms))
            if number == len(shared):
                shared.append(form)
            layers.append([prefix, number, *([tie.name, tie.home] for tie in layer.ties)])
        parts = [[layer.part_of, layer.frozen] for layer in self.layers if layer.part_of is not None]
        found = {"cut": self.cut, "masters": self.masters, "forms": shared, "layers": layers}
        return {**found, "parts": parts} if parts else found

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelSpec:
        """The inverse of `to_json`."""
        layers = []
        parts = data.get("parts", [])
        whole: list[tuple[int | None, bool]] = [(None, False)] * (len(data["layers"]) - len(parts))
        for index, ((prefix, number, *ties), (module, frozen)) in enumerate(zip(data["layers"], [*whole, *parts], strict=True)):
            parameters = [(prefix + name, shape, dtype) for name, dtype, *shape in data["forms"][number]]
            layers.append(LayerSpec.build(index, parameters, [Tie(name=name, home=home) for name, home in ties], module, frozen))
        return cls(layers=tuple(layers), cut=data["cut"], masters=data.get("masters", False))
