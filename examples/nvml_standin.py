"""Stand-in GPUs for machines without one: builds `nvml_standin.c` with gcc, and makes and changes the state that all processes share.

library = build(directory)
standin = StandIn.made(directory / "gpus", [GpuKind()] * 4)
environment = standin.environment(library)          # of processes that are to find these GPUs
with computing(uuid, seconds=0.004, beta=0.8): ...  # in a worker: the body, and then rest until the GPU would be done
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SONAME = "libnvidia-ml.so.1"
SOURCE = Path(__file__).with_suffix(".c")
STATE = "NVML_STANDIN"
"""The environment variable that names the file with the GPUs' state."""

ROOT = "NVML_STANDIN_ROOT"
"""The environment variable that makes a process privileged, for GPUs whose clocks only root may set."""

_GPUS, _CLOCKS, _PROCESSES, _SWEPT, _XIDS, _MAGIC = 16, 128, 16, 16, 8, 0x6E766D6C

ANYBODY, NOBODY, ONLY_ROOT = range(3)
WELL, NEGATIVE, FROZEN, NOTHING = range(4)


class _Gpu(ctypes.Structure):
    _fields_ = (
        ("uuid", ctypes.c_char * 96),
        ("name", ctypes.c_char * 64),
        ("memory_count", ctypes.c_uint32),
        ("memory", ctypes.c_uint32 * 4),
        ("graphics_count", ctypes.c_uint32),
        ("graphics", ctypes.c_uint32 * _CLOCKS),
        *(
            (name, ctypes.c_uint32)
            for name in (
                "application_mhz",
                "idle_mhz",
                "locked_min",
                "locked_max",
                "memory_locked_min",
                "memory_locked_max",
                "thermal_mhz",
                "power_limit_mw",
                "may_set",
                "fails",
                "mig",
                "power_reads",
                "energy_reads",
                "counter_bits",
                "process_count",
            )
        ),
        ("processes", ctypes.c_uint32 * _PROCESSES),
        *((name, ctypes.c_uint32) for name in ("switch_ms", "sets", "resets", "works", "boosts")),
        *((name, ctypes.c_uint32) for name in ("no_ecc", "no_xids", "ecc_corrected", "ecc_uncorrected")),
        ("retired", ctypes.c_uint32 * 2),
        ("remapped", ctypes.c_uint32),
        ("xid_count", ctypes.c_uint32),
        ("xids", ctypes.c_uint32 * _XIDS),
        *(
            (name, ctypes.c_double)
            for name in ("idle_w", "static_w", "dynamic_w", "busy_until", "accrued_at", "energy_j", "frozen_w", "slower")
        ),
        *((name, ctypes.c_double * _SWEPT) for name in ("sweep_mhz", "sweep_stretch", "sweep_w")),
    )


class _State(ctypes.Structure):
    _fields_ = (
        ("magic", ctypes.c_uint32),
        ("gone", ctypes.c_uint32),
        ("count", ctypes.c_uint32),
        ("calls", ctypes.c_uint32),
        ("gpus", _Gpu * _GPUS),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuKind:
    """A kind of GPU: clocks in MHz, descending; the clock under load when nobody locks one; its power model in watts.

    The defaults are made up, of the size of a V100's figures, for tests of mechanisms; `A100` is measured. `slower` is a factor on the time
    of all work. `sweep` has clocks, descending, with the time of the same work as a multiple of that at the first one, and watts during it.
    """

    name: str = "Stand-in GPU"
    graphics: tuple[int, ...] = tuple(range(1530, 600, -45))
    memory: tuple[int, ...] = (877,)
    application_mhz: int = 1305
    idle_mhz: int = 135
    idle_w: float = 55.0
    static_w: float = 95.0
    dynamic_w: float = 190.0
    power_limit_mw: int = 300_000
    slower: float = 1.0
    may_set: int = ANYBODY
    switch_ms: int = 5
    sweep: tuple[tuple[int, float, float], ...] = ()


A100 = GpuKind(
    name="Stand-in A100-SXM",
    graphics=tuple(range(1410, 854, -15)),
    memory=(1593,),
    application_mhz=1410,
    idle_w=70.0,
    power_limit_mw=0,
    sweep=(
        (1410, 1.0, 477.9),
        (1380, 1.0023, 477.5),
        (1350, 1.0103, 455.8),
        (1320, 1.0262, 435.4),
        (1275, 1.0536, 399.5),
        (1230, 1.0871, 365.9),
        (1185, 1.1236, 337.7),
        (1140, 1.1649, 314.7),
        (1080, 1.2237, 284.7),
        (1020, 1.2906, 272.4),
        (960, 1.3655, 261.6),
        (900, 1.4463, 247.0),
        (855, 1.5253, 237.7),
    ),
)
"""Figures of a measured A100-SXM: forward and backward of a stage of GPT-3 175B in bf16, from the artifact of Perseus (SOSP '24) in
https://github.com/ml-energy/zeus (commit 38cb3f9, `sosp24_data/emulation/stage_profile/gpt3-175b+a100_sxm_bf16.csv`): the sums of both, at
13 of its 38 clocks. The idle watts are those that Zeus's pipeline frequency optimizer assumes for a GPU that waits for another (70 W).
No power limit is set here: the sweep contains what the GPU's own limit did, which shows at its three highest clocks."""


class StandIn:
    """The stand-in GPUs of a state file. `gpus[i]` has the fields of `struct gpu` in nvml_standin.c, to be read and changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), ctypes.sizeof(_State))
        self.state = _State.from_buffer(self._memory)

    @classmethod
    def made(cls, path: Path, kinds: Sequence[GpuKind]) -> StandIn:
        """Makes a state file with one GPU of each of `kinds`."""
        path.write_bytes(bytes(ctypes.sizeof(_State)))
        made = cls(path)
        made.state.magic, made.state.count = _MAGIC, len(kinds)
        for index, kind in enumerate(kinds):
            _fill(made.state.gpus[index], f"GPU-5ad1{index:04x}-0000-4000-8000-{index:012x}", kind)
        return made

    @property
    def gpus(self) -> Sequence[_Gpu]:
        return [self.state.gpus[index] for index in range(self.state.count)]

    @property
    def uuids(self) -> list[str]:
        return [gpu.uuid.decode() for gpu in self.gpus]

    @property
    def locked(self) -> list[int]:
        """The clock to which each GPU is locked in MHz, 0 if it is not."""
        return [gpu.locked_max for gpu in self.gpus]

    def xid(self, index: int, number: int) -> None:
        """Lets the driver tell an Xid event of a GPU."""
        gpu = self.gpus[index]
        gpu.xids[gpu.xid_count % _XIDS] = number
        gpu.xid_count += 1

    def environment(self, library: Path) -> dict[str, str]:
        """Returns the variables with which a process finds these GPUs; without them it finds the machine's own driver, if any."""
        others = os.environ.get("LD_LIBRARY_PATH")
        return {STATE: str(self.path), "LD_LIBRARY_PATH": f"{library.parent}{os.pathsep + others if others else ''}"}


def _fill(gpu: _Gpu, uuid: str, kind: GpuKind) -> None:
    gpu.uuid, gpu.name = uuid.encode(), kind.name.encode()
    gpu.memory_count, gpu.graphics_count = len(kind.memory), len(kind.graphics)
    gpu.memory[: len(kind.memory)] = kind.memory
    gpu.graphics[: len(kind.graphics)] = kind.graphics
    for name in ("application_mhz", "idle_mhz", "idle_w", "static_w", "dynamic_w", "power_limit_mw", "slower", "may_set", "switch_ms"):
        setattr(gpu, name, getattr(kind, name))
    for place, point in enumerate(kind.sweep):
        gpu.sweep_mhz[place], gpu.sweep_stretch[place], gpu.sweep_w[place] = point


def build(directory: Path, *flags: str) -> Path:
    """Compiles the library in `directory` with gcc, and returns its path. Raises subprocess.CalledProcessError with gcc's output."""
    library = directory / SONAME
    shared = ["-shared", "-fPIC", f"-Wl,-soname,{SONAME}"]
    subprocess.run(
        ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", *flags, *shared, "-o", str(library), str(SOURCE), "-lpthread"], check=True
    )
    return library


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(SONAME)
    library.standin_begin.argtypes = [ctypes.c_char_p, ctypes.c_double, ctypes.c_double]
    library.standin_begin.restype = ctypes.c_double
    library.standin_wait.argtypes = [ctypes.c_double]
    library.standin_wait.restype = None
    return library


@contextmanager
def computing(uuid: str, seconds: float, beta: float = 1.0) -> Iterator[None]:
    """Occupies a GPU for work that takes `seconds` at its highest clock, of which the share `beta` depends on the clock.

    The body is the real computation, on the processor; what is left of the GPU's time is slept.
    """
    end = _library().standin_begin(uuid.encode(), seconds, beta)
    if end < 0:
        raise LookupError(f"there is no stand-in GPU {uuid}: is {STATE} set?")
    try:
        yield
    finally:
        _library().standin_wait(end)
