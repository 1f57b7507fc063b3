"""Data sets that say which process loads them, and what they do there."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, get_worker_info

from elastic.worker.loading.pool import Pool

SAMPLES = 64


class Noted(Dataset[Any]):
    """Notes in a folder which process loads each sample. In loader processes it does `act` with sample 63."""

    def __init__(self, folder: Path, act: str = "") -> None:
        self.folder, self.act = folder, act
        self.offsets, self.scale, self.shift = torch.arange(float(SAMPLES)), 1.0, [0.0]

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        inside = get_worker_info() is not None
        with (self.folder / f"{'loader' if inside else 'worker'}-{os.getpid()}").open("a") as file:
            file.write(f"{index} ")
        if self.act == "wrong":
            return torch.full((16,), float(inside))
        if index == SAMPLES - 1 and self.act:
            self._do(inside)
        return self.scale * (torch.randn(16) + self.offsets[index] + self.shift[0])

    def _do(self, inside: bool) -> None:
        if self.act == "raise":
            raise KeyError("a sample that is not there")
        if inside and self.act == "wait":
            signal.pause()
        if inside and self.act == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if inside and self.act == "raise inside":
            raise OSError("this process cannot read it")


class Here(Dataset[Any]):
    """Can be unpickled in the process that made it only."""

    def __init__(self) -> None:
        self.pid = os.getpid()

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["pid"] != os.getpid():
            raise ImportError("a library that is not there")
        self.__dict__.update(state)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> int:
        return index


def note(folder: Path, number: int) -> None:
    """A worker_init_fn."""
    info = get_worker_info()
    assert info is not None
    (folder / f"init-{number}-{info.id}-of-{info.num_workers}-{len(info.dataset)}").touch()


def fail(number: int) -> None:
    """A worker_init_fn."""
    raise RuntimeError(f"process {number} has no database")


_start = Pool.start


def wait_for_processes(pool: Pool) -> None:
    """A `Pool.start` that waits until all processes have begun: short trainings end before."""
    _start(pool)
    while not all(loader.begun for loader in pool._loaders.values()):
        pool.hear(None)
