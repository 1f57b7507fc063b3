"""Networks of the DT-FM project (DS3Lab/DT-FM): JSON with the delay in ms and the bandwidth in Gbit/s between each pair of devices."""

from __future__ import annotations

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from elastic.errors import PlanError
from elastic.plan.placement.pairing import Matrix

GROUPS = 8
EXCHANGE_GB = 1.3 * 4 * 3 / 24
BOUNDARY_GB = 2024 * 2048 * 2 * (1.25e5 / 2048) / 2**30
"""Of their model: 3 of the 24 layers of GPT-3 XL (1.3e9 parameters of 4 bytes) a stage, an eighth of 1e6 / 8 tokens a micro-batch; as they
have it in their scheduler, 2024 and 2^30 included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """What `elastic.plan.placement.place` takes: seconds and bytes per second, both (devices, devices); groups; bytes."""

    latency_s: Matrix
    bytes_per_s: Matrix
    groups: int
    exchange_bytes: float
    boundary_bytes: float


def load(path: str | PathLike[str]) -> Instance:
    """The network of a file, with the groups and sizes of their model. Raises PlanError that names the file and the field at fault."""
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
