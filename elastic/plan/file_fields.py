"""Checks values from files and returns them. Each function raises PlanError naming the field."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from elastic.errors import PlanError

T = TypeVar("T")


def item(row: Any, key: str, field: str) -> Any:
    """Returns the value under `key` of a table; `field` is the table's own name, empty for the whole file."""
    if not isinstance(row, Mapping):
        raise PlanError(f"{field or 'the file'} must be a table, not {row!r}")
    if key not in row:
        raise PlanError(f"{join(field, key)} is missing")
    return row[key]


def join(field: str, key: str) -> str:
    """Returns the full name of the field `key` of a table."""
    return f"{field}.{key}" if field else key


def sequence(value: Any, field: str, each: Callable[[Any, str], T], of: str = "") -> tuple[T, ...]:
    """Checks a list, and each item with `each`."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise PlanError(f"{field} must be a list{of}, not {value!r}")
    return tuple(each(one, f"{field}[{place}]") for place, one in enumerate(value))


def text(value: Any, field: str) -> str:
    """Checks a string."""
    if not isinstance(value, str):
        raise PlanError(f"{field} must be text, not {value!r}")
    return value


def name(value: Any, field: str) -> str:
    """Checks a string that is not empty."""
    if not isinstance(value, str) or not value:
        raise PlanError(f"{field} must be a name, not {value!r}")
    return value


def whole(value: Any, field: str) -> int:
    """Checks a whole number, which may be written as 2.0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not number(value, field).is_integer():
        raise PlanError(f"{field} must be a whole number, not {value!r}")
    return int(value)


def number(value: Any, field: str) -> float:
    """Checks a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PlanError(f"{field} must be a number, not {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise PlanError(f"{field} is too large a number") from None


def numbers(values: Any, field: str) -> tuple[float, ...]:
    """Checks a list of numbers."""
    return sequence(values, field, number, " of numbers")


def not_negative(field: str, value: float) -> None:
    """Refuses NaN, infinite and negative values."""
    if not (math.isfinite(value) and value >= 0):
        raise PlanError(f"{field} is {value}; it must be finite and not negative")


def positive(field: str, value: float) -> None:
    """Refuses NaN, infinite, negative values and zero."""
    if not (math.isfinite(value) and value > 0):
        raise PlanError(f"{field} is {value}; it must be finite and positive")
