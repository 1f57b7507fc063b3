"""The gradient norm, from float64 sums over a fixed grid of blocks, so that it does not depend on who owns what."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from elastic.engine.reducer import OwnedGradient
from elastic.layout.regions import BLOCK, ModelSpec
from elastic.memory.tensors import values_of, zeros

_ROWS = 16  # 256 KiB of float32 at a time: faster than all at once


def grid(spec: ModelSpec, layer: int, start: int, stop: int) -> list[tuple[int, int]]:
    """The runs of an interval on whose starts blocks are laid: the interval itself, or its parameters if cuts lie between tensors."""
    if spec.cut == "block":
        return [(start, stop)]
    parameters = spec.layers[layer].parameters
    return [(p.start, p.stop) for p in parameters if start <= p.start < stop and p.size]


def block_sums(values: torch.Tensor) -> torch.Tensor:
    """float64 sum of squares of every run of 4,096 elements; the last may be shorter.

    A row norm of torch does not depend on how many rows there are; a row is below the size that is split over threads. Taking the norm
    and squaring it is twice as fast as squaring and summing: no float64 copy is made.
    """
    whole = values.numel() // BLOCK * BLOCK
    rows = values[:whole].view(-1, BLOCK)
    norms = [_row_norms(chunk) for chunk in rows.split(_ROWS)]
    if whole < values.numel():
        tail = zeros(BLOCK, values.dtype)
        tail[: values.numel() - whole] = values[whole:]
        norms.append(_row_norms(tail.view(1, BLOCK)))
    return torch.cat(norms).square_()


def _row_norms(rows: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)


def square_sums(spec: ModelSpec, gradients: Iterable[OwnedGradient]) -> np.ndarray:
    """All block sums of what a worker owns."""
    sums = [
        block_sums(gradient.memory[start - gradient.interval.start : stop - gradient.interval.start])
        for gradient in gradients
        for start, stop in grid(spec, gradient.layer, gradient.interval.start, gradient.interval.stop)
    ]
    return values_of(torch.cat(sums)) if sums else np.array([])


def norm(sums: Sequence[np.ndarray]) -> float:
    """The L2 norm from block sums, or from `exact.terms` of them: both have the same exact sum, which is rounded once (`math.fsum`), so
    nothing depends on who owns what. Not finite if any block is not, or the sum is above what float64 holds."""
    values = np.concatenate(list(sums)) if sums else np.array([])
    if not np.isfinite(values).all():
        return math.nan
    try:
        return math.sqrt(math.fsum(values.tolist()))
    except OverflowError:
        return math.inf


def clip_factor(norm: float, limit: float | None) -> float:
    """As `torch.nn.utils.clip_grad_norm_`: limit / (norm + 1e-6), at most 1."""
    return 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
