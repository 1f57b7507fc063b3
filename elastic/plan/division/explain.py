"""Explains why a model does not fit: which layer, how many bytes short, on which device."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from elastic.plan.division.compile import most_in_flight
from elastic.plan.division.coverage import furthest_in_memory
from elastic.plan.division.rules import Bytes, PoolCosts
from elastic.plan.division.shapes import Shape


class Shortage(NamedTuple):
    """The bytes that a layer lacks on its least demanding shape."""

    bytes: float
    layer: int
    shape: Shape


def why_nothing_fits(rules: PoolCosts, sizes: tuple[int, ...]) -> str:
    """Returns a sentence for the smallest of these micro-batch sizes and one replica, which need the least memory and devices."""
    useful = [size for size in sorted(sizes) if any(_there(rules, shape) for shape in rules.shapes(size))]
    if not useful:
        kinds = ", ".join(f"{pool.count} {pool.kind}" for pool in rules.pools)
        return f"no profile for {kinds} (micro-batch sizes {list(sizes)}): measure one, or ask for interpolation from FLOPS"
    size = useful[0]
    lack = _worst_layer(rules, size)
    if lack.bytes > 0:
        pool = rules.pools[lack.shape.pool]
        return (
            f"layer {lack.layer} fits on no device, not even alone: {lack.bytes:.0f} bytes short on {pool.kind} "
            f"with tensor parallelism {lack.shape.tp} and micro-batches of {size}"
        )
    return _together(rules, size)


def _there(rules: PoolCosts, shape: Shape) -> bool:
    return shape.tp <= rules.pools[shape.pool].count


def _worst_layer(rules: PoolCosts, size: int) -> Shortage:
    """Returns the layer that lacks most, each on the shape where it lacks least, alone as the last stage."""
    found: list[Shortage] = []
    for layer in range(rules.layers):
        options: list[Shortage] = []
        for shape in filter(lambda shape: _there(rules, shape), rules.shapes(size)):
            foot = rules.footprint(shape, size, False)
            need = foot.fixed[layer, layer + 1] + foot.in_flight[layer, layer + 1]
            options.append(Shortage(float(need - foot.capacity), layer, shape))
        found.append(min(options))
    return max(found)


def _together(rules: PoolCosts, size: int) -> str:
    """Explains, if each layer fits alone but not all together: by the extra bytes per device with which they would fit."""
    if _covered(rules, size, 0.0) == rules.layers:
        return f"the {rules.layers} layers fit into memory, but no stages that do are connected to each other"
    low, high = 0.0, 1.0
    while _covered(rules, size, high) < rules.layers:
        low, high = high, 2 * high
        if high > 1e18:
            return f"{rules.layers} layers do not fit on the devices, whatever their memory: there are too few devices"
    while high - low > max(1.0, 1e-6 * high):
        middle = (low + high) / 2
        low, high = (middle, high) if _covered(rules, size, middle) < rules.layers else (low, middle)
    layer = _covered(rules, size, 0.0)
    kinds = ", ".join(sorted({pool.kind for pool in rules.pools}))
    return (
        f"layers 0 to {layer - 1} fill all devices ({kinds}) and layer {layer} fits nowhere: every device is {high:.0f} bytes short, "
        f"with micro-batches of {size} and one replica"
    )


def _covered(rules: PoolCosts, size: int, extra: float) -> int:
    """Returns how many layers one pipeline can hold at most, with `extra` more bytes on each device."""
    shapes = [shape for shape in rules.shapes(size) if _there(rules, shape)]
    feet = [rules.footprint(shape, size, False) for shape in shapes]
    most = [most_in_flight(Bytes(fixed=foot.fixed, in_flight=foot.in_flight, capacity=foot.capacity + extra)) for foot in feet]
    units = np.array([[shape.tp * (shape.pool == number) for number in range(len(rules.pools))] for shape in shapes])
    available = np.array([pool.count for pool in rules.pools])
    return furthest_in_memory(np.stack(most), units, available)
