"""Reads networks of the DT-FM project (DS3Lab/DT-FM): JSON with delay in ms and bandwidth in Gbit/s between devices. Computes its cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from elastic.errors import PlanError
from elastic.plan.placement.network import measured
from elastic.plan.placement.pairing import Matrix

GROUPS = 8
EXCHANGE_GB = 1.3 * 4 * 3 / 24
BOUNDARY_GB = 2024 * 2048 * 2 * (1.25e5 / 2048) / 2**30
"""GB sent in an exchange and over a boundary, for DT-FM's model: a stage has 3 of the 24 layers of GPT-3 XL (1.3e9 parameters of 4 bytes),
a micro-batch an eighth of 1e6 / 8 tokens. The numbers are those of DT-FM's scheduler, including 2024 and 2^30."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """The arguments of `elastic.plan.placement.place`: seconds and bytes per second, both (devices, devices); groups; bytes."""

    latency_s: Matrix
    bytes_per_s: Matrix
    groups: int
    exchange_bytes: float
    boundary_bytes: float


def cost(instance: Instance, groups: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Returns the seconds of the exchange and of the boundaries, for groups in the given order. Their sum is the cost.

    Exchange: max over groups and members of the sum over the n - 1 others of 2 (latency + exchange_bytes / (n bandwidth)). Boundaries:
    twice the sum over neighbouring groups of the slowest link, latency + boundary_bytes / bandwidth, of their best pairing. Raises
    PlanError on malformed links, or if the groups do not contain every device once.
    """
    links = measured(instance.latency_s, instance.bytes_per_s, len(groups), instance.exchange_bytes, instance.boundary_bytes)
    if sorted(device for group in groups for device in group) != list(range(links.devices)) or not all(groups):
        raise PlanError(f"groups must be of all {links.devices} devices, each once, and none empty: {groups}")
    boundary_s = 2 * sum(links.boundary_between(one, two) for one, two in pairwise(groups))
    return max(links.slowest_member(group)[0] for group in groups), boundary_s


def load(path: str | PathLike[str]) -> Instance:
    """Reads the network of a file, with groups and sizes of DT-FM's model. Raises PlanError naming the file and the wrong field."""
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise PlanError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise PlanError(f"{path} must hold one object with delay_ms and bandwidth_gbps")
    delay, bandwidth = _matrix(path, data, "delay_ms"), _matrix(path, data, "bandwidth_gbps")
    if delay.shape != bandwidth.shape:
        raise PlanError(f"{path}: delay_ms is {delay.shape} and bandwidth_gbps {bandwidth.shape}: both must be (devices, devices)")
    return Instance(
        latency_s=delay / 1e3,
        bytes_per_s=bandwidth * 1e9 / 8,
        groups=GROUPS,
        exchange_bytes=EXCHANGE_GB * 1e9,
        boundary_bytes=BOUNDARY_GB * 1e9,
    )


def _matrix(path: str | PathLike[str], data: dict[str, Any], field: str) -> Matrix:
    if field not in data:
        raise PlanError(f"{path} has no field {field}")
    try:
        matrix = np.array(data[field], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise PlanError(f"{path}: {field} must be a square matrix of numbers: {error}") from error
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise PlanError(f"{path}: {field} has shape {matrix.shape}; it must be (devices, devices)")
    return matrix
