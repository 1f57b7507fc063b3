"""Costs of layers, measured or computed: seconds per device kind, micro-batch size and tensor-parallel degree; bytes per degree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from elastic.errors import PlanError
from elastic.plan.cluster import DeviceKind
from elastic.plan.file_fields import item, not_negative, numbers, sequence, text, whole


class LayerSeconds(NamedTuple):
    """Seconds of one layer: forward and backward of one micro-batch, and the update, once a step."""

    forward_s: float
    backward_s: float
    update_s: float


class LayerBytes(NamedTuple):
    """Bytes of one layer on one device: parameters; per sample, activations kept for backward, and the output sent to the next layer."""

    parameters: float
    activations: float
    output: float


class Measured(NamedTuple):
    """The key of a profile: a device kind, samples per micro-batch, and the number of devices that each layer is spread over."""

    kind: str
    size: int
    tp: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiles:
    """All profiles, each with one entry per layer. Raises PlanError naming the entry that is missing, negative or NaN."""

    seconds: Mapping[Measured, tuple[LayerSeconds, ...]]
    bytes: Mapping[int, tuple[LayerBytes, ...]]

    def __post_init__(self) -> None:
        if 1 not in self.bytes or not self.bytes[1]:
            raise PlanError("bytes of at least one layer are needed, without tensor parallelism (tp 1)")
        for tp, layers in self.bytes.items():
            _check(f"bytes of tp {tp}", layers, self.layers)
        for measured, layers in self.seconds.items():
            _check(_name(measured), layers, self.layers)

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return len(self.bytes[1])

    def sizes(self) -> tuple[int, ...]:
        """All micro-batch sizes, ascending."""
        return tuple(sorted({measured.size for measured in self.seconds}))

    def degrees(self, kind: str, size: int) -> tuple[int, ...]:
        """The tensor-parallel degrees for which both seconds and bytes are known, ascending."""
        return tuple(sorted(m.tp for m in self.seconds if m.kind == kind and m.size == size and m.tp in self.bytes))

    def of(self, kind: str, size: int, tp: int) -> tuple[LayerSeconds, ...]:
        """Returns one profile. Raises PlanError if there is none."""
        found = self.seconds.get(Measured(kind, size, tp))
        if found is None:
            known = sorted(f"{m.size}/{m.tp}" for m in self.seconds if m.kind == kind)
            raise PlanError(f"there is no {_name(Measured(kind, size, tp))}; known for {kind} (size/tp): {', '.join(known) or 'none'}")
        return found

    def check_kinds(self, kinds: Mapping[str, DeviceKind]) -> None:
        """Raises PlanError if a device kind has no profile."""
        for kind in kinds:
            if not any(measured.kind == kind for measured in self.seconds):
                raise PlanError(f"there is no profile for device kind {kind}: measure one, or ask for interpolation from FLOPS")

    def interpolated(self, kinds: Mapping[str, DeviceKind]) -> Profiles:
        """Adds profiles for kinds that have none, scaled by FLOPS from the kind whose FLOPS are nearest.

        This is a guess, made only on request. Raises PlanError if FLOPS of a kind without profile, or of all kinds with one, are unknown.
        """
        seconds = dict(self.seconds)
        measured = {m.kind for m in self.seconds}
        sources = {name: flops for name, kind in kinds.items() if name in measured and (flops := kind.flops) is not None}
        for name, kind in kinds.items():
            if name in measured:
                continue
            if kind.flops is None or not sources:
                raise PlanError(
                    f"device kind {name} has no profile and cannot be interpolated: FLOPS of it and of a profiled kind are needed"
                )
            source = _nearest(sources, kind.flops)
            factor = sources[source] / kind.flops
            for m, layers in self.seconds.items():
                if m.kind == source:
                    scaled = tuple(LayerSeconds(*(value * factor for value in layer)) for layer in layers)
                    seconds[Measured(name, m.size, m.tp)] = scaled
        return Profiles(seconds=seconds, bytes=self.bytes)

    def without_noise(self) -> Profiles:
        """Makes no layer slower than it was measured for larger micro-batches: more samples are never less work."""
        seconds = dict(self.seconds)
        for m in sorted(self.seconds, key=lambda m: -m.size):
            larger = [other for other in self.seconds if (other.kind, other.tp) == (m.kind, m.tp) and other.size > m.size]
            for other in larger:
                pairs = zip(seconds[m], seconds[other], strict=True)
                seconds[m] = tuple(LayerSeconds(*map(min, mine, theirs)) for mine, theirs in pairs)
        return Profiles(seconds=seconds, bytes=self.bytes)

    @classmethod
    def from_json(cls, data: Any) -> Profiles:
        """Reads profiles from a file's data. Raises PlanError naming the wrong field."""
        seconds: dict[Measured, tuple[LayerSeconds, ...]] = {}
        for place, row in enumerate(_rows(data, "seconds")):
            field = f"seconds[{place}]"
            measured = Measured(text(item(row, "kind", field), f"{field}.kind"), _positive(row, "size", field), _positive(row, "tp", field))
            seconds[measured] = tuple(LayerSeconds(*values) for values in _triples(row, field))
        sizes: dict[int, tuple[LayerBytes, ...]] = {}
        for place, row in enumerate(_rows(data, "bytes")):
            field = f"bytes[{place}]"
            sizes[_positive(row, "tp", field)] = tuple(LayerBytes(*values) for values in _triples(row, field))
        return cls(seconds=seconds, bytes=sizes)


def _nearest(flops: Mapping[str, float], wanted: float) -> str:
    return min(flops, key=lambda kind: abs(flops[kind] - wanted))


def _name(measured: Measured) -> str:
    return f"profile of {measured.kind} for micro-batches of {measured.size} and tp {measured.tp}"


def _check(name: str, layers: tuple[LayerSeconds, ...] | tuple[LayerBytes, ...], count: int) -> None:
    if len(layers) != count:
        raise PlanError(f"{name} has {len(layers)} layers instead of {count}")
    for number_, layer in enumerate(layers):
        for field, value in zip(layer._fields, layer, strict=True):
            not_negative(f"{name}, layer {number_}: {field}", value)


def _rows(data: Any, key: str) -> tuple[Any, ...]:
    return sequence(item(data, key, "profiles"), f"profiles.{key}", lambda row, _: row)


def _positive(row: Any, key: str, field: str) -> int:
    found = whole(item(row, key, field), f"{field}.{key}")
    if found < 1:
        raise PlanError(f"{field}.{key} must be a positive whole number, not {found!r}")
    return found


def _triples(row: Any, field: str) -> tuple[tuple[float, ...], ...]:
    return sequence(item(row, "layers", field), f"{field}.layers", _triple)


def _triple(layer: Any, field: str) -> tuple[float, ...]:
    if not isinstance(layer, list) or len(layer) != 3:
        raise PlanError(f"{field} must be three numbers, not {layer!r}")
    return numbers(layer, field)
