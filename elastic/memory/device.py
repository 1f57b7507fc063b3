"""The device that this process's layers compute on: the CPU, or another one with memory of its own.

A worker has one device, chosen once, before anything is computed (`use`). All memory that layers compute on is allocated there. Host memory
that a device copies from or to in the background must be pinned, so that the device can read it by itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch

from elastic.memory import raw

CPU = torch.device("cpu")
DEVICE_ALIGNMENT_BYTES = 512
"""Tensors that layers get as input start at a multiple of this on a device: kernels may depend on alignment, and allocators give it."""

_OPEN_RUNS = 256

_device = CPU
_workers = 1


def use(device: torch.device, workers: int = 1) -> None:
    """Makes `device`, with its index, torch's current one, and the one that this process computes on; so many `workers` share it."""
    global _device, _workers
    _device, _workers = CPU if device.type == "cpu" else device, workers
    if device.type != "cpu":
        module(device).set_device(device)


def current() -> torch.device:
    """Returns the device that layers compute on here."""
    return _device


def on_host() -> bool:
    """Returns whether layers compute on the CPU, where tensors and bytes on the host share memory."""
    return _device is CPU


def alignment() -> int:
    """Returns the bytes at whose multiples the inputs of layers start."""
    return raw.ALIGNMENT_BYTES if _device is CPU else DEVICE_ALIGNMENT_BYTES


def module(device: torch.device) -> Any:
    """Returns torch's module for a kind of device, such as `torch.cuda`."""
    return torch.get_device_module(device)


def placed(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor on the device that layers compute on; itself if it lies there."""
    return tensor if tensor.device == _device else tensor.to(_device)


def free_bytes() -> tuple[int, int] | None:
    """Returns how many bytes of the device's memory are free, and how many it has; None on the CPU, or if nobody knows."""
    found = None if _device is CPU else getattr(module(_device), "mem_get_info", None)
    return None if found is None else found(_device)


def usable_bytes(besides: int) -> int | None:
    """Returns how many bytes of the device's memory this process may use for layers and their state; None on the CPU, or if nobody knows.

    That is what is free, and what torch has reserved here, without what the user's code has allocated `besides` so many bytes of layers;
    at most an even share if several workers use the device.
    """
    found = None if _device is CPU else getattr(module(_device), "mem_get_info", None)
    if found is None:
        return None
    free, total = found(_device)
    reserved, allocated = (_own_bytes(name) for name in ("memory_reserved", "memory_allocated"))
    return max(0, min(free + reserved, total // _workers) - max(0, allocated - besides))


def _own_bytes(name: str) -> int:
    """Returns a count of torch's allocator for this process; 0 if the kind of device has none."""
    count = getattr(module(_device), name, None)
    return 0 if count is None else int(count(_device))


def generator_state() -> torch.Tensor | None:
    """Returns the state of the device's default generator; None on the CPU."""
    return None if _device is CPU else module(_device).get_rng_state(_device)


def set_generator_state(state: torch.Tensor) -> None:
    """Sets the state of the device's default generator."""
    module(_device).set_rng_state(state, _device)


def seed_generator(seed: int) -> None:
    """Seeds the device's default generator with 64 bits. Does nothing on the CPU."""
    if _device is not CPU:
        state = raw.zeros(16)  # of every counter-based generator of torch: seed, and how much was drawn
        raw.typed(state, "<u8")[0] = seed & ((1 << 64) - 1)
        module(_device).set_rng_state(torch.from_numpy(state), _device)


def pin(memory: np.ndarray) -> bool:
    """Pins host memory that is mapped already, such as a segment's; returns False if that is refused. It stays pinned until `unpin`."""
    if _device.type == "cuda":
        runtime: Any = torch.cuda.cudart()
        done = int(runtime.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)) == 0
        return done or _forget_error()
    pins = getattr(module(_device), "pin", None)
    if pins is None:
        return False
    try:
        pins(memory.ctypes.data, memory.nbytes)
    except RuntimeError:
        return False
    return True


def _forget_error() -> bool:
    """Takes a refusal from CUDA's last error, which the next launch of a kernel would raise otherwise. Returns False."""
    with suppress(RuntimeError):
        torch.ones(1, device=_device)
    return False


def unpin(address: int) -> None:
    """Ends the pinning of memory that began at an address."""
    if _device.type == "cuda":
        runtime: Any = torch.cuda.cudart()
        runtime.cudaHostUnregister(address)
    else:
        module(_device).unpin(address)


def clock() -> float:
    """Returns wall-clock seconds once the device has computed what it was given; copies beside the computation are not waited for."""
    if _device is not CPU:
        _stream().synchronize()
    return time.perf_counter()


class Timer:
    """Sums up how long the device computes between `begin` and `end`; neither waits for it."""

    def __init__(self) -> None:
        self._began: Any = None
        self._open: list[tuple[Any, Any]] = []
        self._seconds = 0.0

    def begin(self) -> None:
        """Begins a run of computation."""
        self._began = _timed()

    def end(self) -> None:
        """Ends it. The runs that the device has finished are summed up now and then, so that there are few events."""
        self._open.append((self._began, _timed()))
        if len(self._open) >= _OPEN_RUNS and self._open[_OPEN_RUNS // 2][1].query():
            self._sum_up(self._open[: _OPEN_RUNS // 2])
            del self._open[: _OPEN_RUNS // 2]

    def seconds(self) -> float:
        """Returns the seconds of all runs; waits for the last one."""
        if self._open:
            self._open[-1][1].synchronize()
        self._sum_up(self._open)
        self._open = []
        return self._seconds

    def _sum_up(self, runs: list[tuple[Any, Any]]) -> None:
        self._seconds += sum(began.elapsed_time(ended) for began, ended in runs) / 1e3


def _timed() -> Any:
    event = torch.Event(device=_device, enable_timing=True)
    event.record(_stream())
    return event


def _stream() -> torch.Stream:
    """Returns the stream that this thread computes on. A thread's current device may be another one."""
    return torch.accelerator.current_stream(_device)


class SideStream:
    """A stream for copies beside the computation. Copies begin when all computation so far is done; `wait` returns when they are over."""

    def __init__(self) -> None:
        self._stream = torch.Stream(device=_device)
        self._done: Any = None

    @contextmanager
    def after_computation(self) -> Iterator[None]:
        """Work of this block follows all computation that was launched before it."""
        before = torch.Event(device=_device)
        before.record(_stream())
        self._stream.wait_event(before)
        with self._stream:
            yield
        self._done = torch.Event(device=_device)
        self._done.record(self._stream)

    @property
    def last(self) -> Any:
        """The event behind the copies of the last block; None if there was none, or they were waited for."""
        return self._done

    def before_computation(self) -> None:
        """All computation that is launched from now on follows the copies so far; the host does not wait."""
        if self._done is not None:
            _stream().wait_event(self._done)

    @property
    def over(self) -> bool:
        """Whether all copies are over."""
        return self._done is None or self._done.query()

    def wait(self) -> None:
        """Waits, on the host, until the copies are over."""
        if self._done is not None:
            self._done.synchronize()
            self._done = None
