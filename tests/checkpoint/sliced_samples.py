"""Strategies for slicings, and their expected slices, computed from the format's definition and not by the code under test."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from hypothesis import strategies as st

from elastic.checkpoint.slices import Slicing
from elastic.checkpoint.state import Contents, Spec

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64)
Tensors = Mapping[tuple[str, str], torch.Tensor]


def reference(whole: torch.Tensor, slicing: Slicing, rank: int) -> torch.Tensor:
    """The slice of `rank`."""
    found, position = [], 0
    for part in slicing.widths:
        shares = whole.narrow(slicing.dim, position, sum(part)).split(list(part), slicing.dim)
        found.append(shares[rank])
        position += sum(part)
    mine = torch.cat(found, slicing.dim)
    if slicing.padded is not None:
        shape = list(mine.shape)
        shape[slicing.dim] = slicing.padded[rank] - shape[slicing.dim]
        mine = torch.cat([mine, torch.zeros(shape, dtype=mine.dtype)], slicing.dim)
    return mine


@st.composite
def widths_of(draw: st.DrawFn, extent: int, most_ranks: int = 4) -> tuple[tuple[int, ...], ...]:
    """Any parts, and any shares of them."""
    ranks, parts = draw(st.integers(1, most_ranks)), draw(st.integers(1, 3))
    cuts = sorted(draw(st.lists(st.integers(0, extent), min_size=ranks * parts - 1, max_size=ranks * parts - 1)))
    shares = [stop - start for start, stop in zip([0, *cuts], [*cuts, extent], strict=True)]
    return tuple(tuple(shares[i * ranks : (i + 1) * ranks]) for i in range(parts))


@st.composite
def slicings(draw: st.DrawFn, shape: tuple[int, ...]) -> Slicing:
    """Any slicing of tensors of this shape, with at least one dimension."""
    dim = draw(st.integers(0, len(shape) - 1))
    widths = draw(widths_of(shape[dim]))
    own = [sum(part[rank] for part in widths) for rank in range(len(widths[0]))]
    padded = tuple(width + draw(st.integers(0, 3)) for width in own) if draw(st.booleans()) else None
    return Slicing(dim=dim, widths=widths, padded=padded)


shapes = st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple)


def contents_of(values: Tensors) -> Contents:
    tensors: dict[str, dict[str, Spec]] = {}
    for (name, state), tensor in values.items():
        tensors.setdefault(name, {})[state] = Spec(shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))
    return Contents(tensors=tensors)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def any_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Values of any bits, not a number among them."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, wide), dtype=torch.uint8, generator=generator)
    return raw.reshape(-1).view(dtype).reshape(shape)
