"""The most floating-point operations a second that this worker's device can do, for the figure MFU: 0.0 where it is unknown.

Of the CPU it is measured, by a product of matrices with the worker's threads. Of GPUs it is what the maker publishes, for dense products:
data sheets of NVIDIA's V100, T4, A10, A30, A40, A100, L4, L40S, H100, H200 and RTX A6000. Half precision has the rate with float32 sums.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import torch

from elastic.memory import device
from elastic.memory.tensors import empty

_SIDES = (128, 384)
_RUNS = 3
_ENOUGH_S = 0.02

_TERA = 1e12
_GPUS: dict[str, tuple[float, float, float]] = {
    # name: float16 and bfloat16, TF32, float32
    "H200": (989.5, 494.7, 67.0),
    "H100 NVL": (835.5, 417.5, 60.0),
    "H100 PCIe": (756.5, 378.0, 51.0),
    "H100": (989.5, 494.7, 67.0),
    "A100": (312.0, 156.0, 19.5),
    "A40": (149.7, 74.8, 37.4),
    "A30": (165.0, 82.0, 10.3),
    "A10": (125.0, 62.5, 31.2),
    "RTX A6000": (154.8, 77.4, 38.7),
    "L40S": (362.0, 183.0, 91.6),
    "L4": (121.0, 60.0, 30.3),
    "T4": (65.0, 0.0, 8.1),
    "V100-PCIE": (112.0, 0.0, 14.0),
    "V100-SXM2": (125.0, 0.0, 15.7),
}
_NO_BFLOAT16 = ("T4", "V100")
"""They compute it without their tensor cores, at a rate that is not published."""


def peak(dtype: torch.dtype, sharing: int = 1, clock: Callable[[], float] = time.thread_time) -> float:
    """Returns the operations a second of products of this type. A device that `sharing` workers have counts for a part each."""
    if device.on_host():
        return measured(dtype, clock)
    if device.current().type != "cuda":
        return 0.0
    tensor32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return published(torch.cuda.get_device_name(), dtype, tensor32=tensor32) / sharing


def measured(dtype: torch.dtype, clock: Callable[[], float] = time.thread_time) -> float:
    """Returns the best rate of a few products of matrices: 5 ms of one current core."""
    best = 0.0
    for side in _SIDES:
        factor = torch.linspace(-1.0, 1.0, side * side).reshape(side, side).to(dtype)
        product = empty((side, side), dtype)
        took = [_seconds(factor, product, clock) for _ in range(_RUNS)]
        best = max(best, 2 * side**3 / min(took))
        if min(took) * (_SIDES[-1] / side) ** 3 > _ENOUGH_S:
            break
    return best


def _seconds(factor: torch.Tensor, product: torch.Tensor, clock: Callable[[], float]) -> float:
    began = clock()
    torch.mm(factor, factor, out=product)
    return max(clock() - began, 1e-9)


def published(name: str, dtype: torch.dtype, *, tensor32: bool) -> float:
    """Returns what is published for a GPU of this name, as CUDA gives it; 0.0 if it is not in the list, or is a part of a GPU.

    `tensor32`: products of float32 run as TF32.
    """
    found = next((known for known in _GPUS if re.search(rf"\b{known}\b", name)), None)
    if found is None or "MIG" in name:
        return 0.0
    half, tf32, full = _GPUS[found]
    if dtype == torch.float16 or (dtype == torch.bfloat16 and not found.startswith(_NO_BFLOAT16)):
        return half * _TERA
    if dtype == torch.float32:
        return (tf32 or full if tensor32 else full) * _TERA
    return 0.0
