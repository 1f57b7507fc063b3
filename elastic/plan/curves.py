"""The time of a message as a function of its size, from measured latency and bandwidth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from elastic.errors import PlanError
from elastic.plan.file_fields import not_negative, number, numbers, positive

Seconds = NDArray[np.float64]


class Curve(Protocol):
    """Time as a function of size."""

    def seconds(self, size: ArrayLike) -> Seconds:
        """Seconds for messages of `size` bytes, any shape; 0 for 0 bytes."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """A latency, and one bandwidth for all sizes."""

    latency_s: float = 0.0
    bytes_per_s: float

    def __post_init__(self) -> None:
        not_negative("latency_s", self.latency_s)
        positive("bytes_per_s", self.bytes_per_s)

    def seconds(self, size: ArrayLike) -> Seconds:
        size = np.asarray(size, dtype=float)
        return np.where(size > 0, self.latency_s + size / self.bytes_per_s, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A latency, and bandwidths measured at ascending sizes: linear in between, constant outside."""

    latency_s: float = 0.0
    sizes: tuple[float, ...]
    bytes_per_s: tuple[float, ...]

    def __post_init__(self) -> None:
        not_negative("latency_s", self.latency_s)
        if not self.sizes or len(self.sizes) != len(self.bytes_per_s) or list(self.sizes) != sorted(set(self.sizes)):
            raise PlanError(f"sizes must ascend, with a bandwidth each: {self.sizes} and {self.bytes_per_s}")
        for value in self.bytes_per_s:
            positive("bytes_per_s", value)

    def seconds(self, size: ArrayLike) -> Seconds:
        size = np.asarray(size, dtype=float)
        return np.where(size > 0, self.latency_s + size / np.interp(size, self.sizes, self.bytes_per_s), 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Polynomial:
    """A latency, and a bandwidth in GB/s: a polynomial in log2(size / 1e6), highest power first, as fitted to measurements.

    Where the polynomial is not positive (far from the measured sizes) the message takes infinitely long.
    """

    latency_s: float = 0.0
    coefficients: tuple[float, ...]

    def __post_init__(self) -> None:
        not_negative("latency_s", self.latency_s)
        if not self.coefficients or not all(math.isfinite(value) for value in self.coefficients):
            raise PlanError(f"coefficients must be finite, at least one: {self.coefficients}")

    def seconds(self, size: ArrayLike) -> Seconds:
        size = np.asarray(size, dtype=float)
        x = np.log2(np.where(size > 0, size, 1e6) / 1e6)
        bandwidth = np.zeros_like(x)
        for coefficient in self.coefficients:
            bandwidth = bandwidth * x + coefficient
        with np.errstate(over="ignore"):  # a bandwidth close to 0 also means infinitely long
            moved = np.divide(size / 1e9, bandwidth, out=np.full_like(x, math.inf), where=bandwidth > 0)
        return np.where(size > 0, self.latency_s + moved, 0.0)


def curve_from_json(data: Any, field: str) -> Curve:
    """Reads any kind of curve from a file's data. Raises PlanError naming the wrong field."""
    if not isinstance(data, Mapping):
        raise PlanError(f"{field} must be a table with bytes_per_s or coefficients, not {data!r}")
    latency_s = number(data.get("latency_s", 0.0), f"{field}.latency_s")
    try:
        if "coefficients" in data:
            return Polynomial(latency_s=latency_s, coefficients=numbers(data["coefficients"], f"{field}.coefficients"))
        if "sizes" in data:
            bandwidths = numbers(data.get("bytes_per_s"), f"{field}.bytes_per_s")
            return Table(latency_s=latency_s, sizes=numbers(data["sizes"], f"{field}.sizes"), bytes_per_s=bandwidths)
        return Constant(latency_s=latency_s, bytes_per_s=number(data.get("bytes_per_s"), f"{field}.bytes_per_s"))
    except PlanError as error:
        raise PlanError(str(error) if str(error).startswith(field) else f"{field}: {error}") from None
