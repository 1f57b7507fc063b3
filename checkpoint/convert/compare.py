"""Compares two checkpoints, tensor by tensor, bit by bit, by runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from elastic.checkpoint.convert.output import silent_bytes
from elastic.checkpoint.state import PARAM, Source, Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The result of one comparison: what was compared, and how it differs, in words. `equal`: it does not differ."""

    what: str
    how: str
    equal: bool = False


def _bits(flat: torch.Tensor) -> torch.Tensor:
    width = flat.element_size()
    return (
        flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width])
        if width <= 8
        else torch.view_as_real(flat).view(torch.int64)
    )


def compare_tensor(
    left: Source, right: Source, name: str, state: str, spec: Spec, limit: int, on_compared: Callable[[int], None] = silent_bytes
) -> str | None:
    """Returns how the values differ, None if all bits are equal. `limit`: bytes of one run. on_compared: called with the bytes compared."""
    count, step = spec.elements, max(1, limit // spec.itemsize)
    first, largest, differing = None, 0.0, 0
    for at in range(0, count, step):
        a, b = left.read(name, state, at, min(count, at + step)), right.read(name, state, at, min(count, at + step))
        on_compared(a.nbytes)
        if torch.equal(_bits(a), _bits(b)):
            continue
        unequal = (_bits(a) != _bits(b)).reshape(len(a), -1).any(dim=1)
        where = unequal.nonzero().reshape(-1)
        first, differing = at + int(where[0]) if first is None else first, differing + len(where)
        wide = torch.complex128 if a.is_complex() else torch.float64
        largest = max(largest, float(torch.nan_to_num((a[where].to(wide) - b[where].to(wide)).abs(), nan=math.inf).max()))
    if first is None:
        return None
    index = [] if not spec.shape else [int(part) for part in torch.unravel_index(torch.tensor(first), spec.shape)]
    return f"{differing} of {count} elements differ, the first at {index}, the largest absolute difference is {largest:g}"


def _keys(source: Source) -> dict[tuple[str, str], Spec]:
    """Returns the specs of all tensors, also under tied names."""
    tensors = source.contents.tensors
    own = {(name, state): spec for name, states in tensors.items() for state, spec in states.items()}
    return own | {(name, PARAM): tensors[target][PARAM] for name, target in source.contents.ties.items()}


class Untied:
    """A source that reads tied names too."""

    def __init__(self, source: Source) -> None:
        self.source, self.format, self.contents = source, source.format, source.contents

    def read(self, name: str, state: str, start: int, stop: int) -> torch.Tensor:
        return self.source.read(self.contents.ties.get(name, name), state, start, stop)

    def close(self) -> None:
        self.source.close()


def compare(
    left: Source,
    right: Source,
    *,
    limit: int,
    weights_only: bool = False,
    extra: bool = False,
    on_compared: Callable[[int], None] = silent_bytes,
) -> Iterator[Difference]:
    """Yields a comparison of everything that one or both hold. `limit`: bytes of one run. extra: the extra values too.

    on_compared: called with the bytes that were compared.
    """
    a, b = _keys(left), _keys(right)
    left, right = Untied(left), Untied(right)
    for key in list(dict.fromkeys([*a, *b])):
        name, state = key
        if weights_only and state != PARAM:
            continue
        what = name if state == PARAM else f"{name} {state}"
        if key not in a or key not in b:
            yield Difference(what=what, how=f"only in the {'first' if key in a else 'second'}")
        elif a[key] != b[key]:
            yield Difference(what=what, how=f"{a[key].dtype} {list(a[key].shape)} and {b[key].dtype} {list(b[key].shape)}")
        else:
            how = compare_tensor(left, right, name, state, a[key], limit, on_compared)
            yield Difference(what=what, how=how or "equal", equal=how is None)
    if not weights_only:
        yield from _compare_rest(left, right, extra)


def _compare_rest(left: Source, right: Source, extra: bool) -> Iterator[Difference]:
    a, b = left.contents, right.contents
    for name in dict.fromkeys([*a.scalars, *b.scalars]):
        yield _values(f"{name} scalars", dict(a.scalars.get(name, {})), dict(b.scalars.get(name, {})))
    for index in range(max(len(a.groups), len(b.groups))):
        groups = [{"names": list(s.groups[index].names), **s.groups[index].settings} if index < len(s.groups) else {} for s in (a, b)]
        yield _values(f"group {index}", *groups)
    yield _values("step", {"step": a.step}, {"step": b.step})
    if extra:
        yield _values("extra", dict(a.extra), dict(b.extra))


def _values(what: str, left: dict[str, Any], right: dict[str, Any]) -> Difference:
    """Compares by `repr`, which is exact for every float and makes NaN equal to itself."""
    keys = [key for key in dict.fromkeys([*left, *right]) if repr(left.get(key)) != repr(right.get(key)) or (key in left) != (key in right)]
    if not keys:
        return Difference(what=what, how="equal", equal=True)
    shown = [f"{key} is {left.get(key, 'missing')!r} and {right.get(key, 'missing')!r}" for key in keys[:3]]
    return Difference(what=what, how="; ".join(shown))
