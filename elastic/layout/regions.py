"""The coordinates of state: a model is a sequence of layers, and a layer is one flat vector of elements.

A layer's vector holds its trainable parameters in definition order, each starting at a multiple of `ALIGNMENT`. The padding after
a parameter belongs to the vector and is zero. Every state of an element (the parameter itself, each optimizer state) has the same
coordinate `(layer, position)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any, Literal

from elastic.errors import LayoutError

ALIGNMENT = 64
"""Elements. Optimizers that round differently on vector tails are bit-equal under any cut at this alignment."""

BLOCK = 4096
"""Elements: the unit of cuts, digests and norms."""

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one element, by dtype name."""

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
    """One layer's flat vector. Its size is 0 if it has no parameters."""

    index: int
    parameters: tuple[ParameterSpec, ...]
    ties: tuple[Tie, ...] = ()

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
            if not 0 <= tie.home < self.index:
                raise LayoutError(f"layer {self.index}: the home of tied parameter {tie.name!r} is layer {tie.home}, not a lower one")

    @classmethod
    def build(cls, index: int, parameters: Iterable[tuple[str, Sequence[int], str]], ties: Iterable[Tie] = ()) -> LayerSpec:
        """Places the parameters `(name, shape, dtype)` one after the other, in the given order."""
        placed: list[ParameterSpec] = []
        position = 0
        for name, shape, dtype in parameters:
            placed.append(ParameterSpec(name=name, shape=tuple(shape), dtype=dtype, start=position))
            position = align(placed[-1].stop)
        return cls(index=index, parameters=tuple(placed), ties=tuple(ties))

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


@dataclass(frozen=True, slots=True, kw_only=True)
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
            for tie in layer.ties:
                self.layers[tie.home].parameter(tie.name)

    def has_masters(self, layer: int) -> bool:
        """Whether a layer's parameters have masters."""
        return self.masters and self.layers[layer].dtype in NARROW

    def has(self, layer: int, state: str) -> bool:
        """Whether a layer may have this state."""
        return state != MASTER or self.has_masters(layer)

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
        return {"cut": self.cut, "masters": self.masters, "forms": shared, "layers": layers}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelSpec:
        """The inverse of `to_json`."""
        layers = []
        for index, (prefix, number, *ties) in enumerate(data["layers"]):
            parameters = [(prefix + name, shape, dtype) for name, dtype, *shape in data["forms"][number]]
            layers.append(LayerSpec.build(index, parameters, [Tie(name=name, home=home) for name, home in ties]))
        return cls(layers=tuple(layers), cut=data["cut"], masters=data.get("masters", False))
