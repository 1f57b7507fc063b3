"""A device for torch that is not the CPU, for tests: torch calls it `fake`, and computes on it with the kernels of the CPU.

It is as strict as a real device, or stricter:
- A tensor's memory lies in address space that is never mapped: any access by the host is a SIGSEGV.
- Copies that are asked to be non-blocking, from or to pinned memory, are late: they run when something waits for them. Until then the host
  memory that is copied to has no values (bytes 0xA5).
- An access that is not ordered after a conflicting access of another stream is an error, whatever would have happened (`streams.h`).
- Memory that was not written to, or was freed, is NaN.
- Tensors of several devices in one operation, and tensors of the host with dimensions, are an error.
- Its generators are its own; a context does not survive a fork; `fail` breaks a device for good, as sticky errors of CUDA do.

`FAKE_DEVICES` is the number of devices (4), `FAKE_DEVICE_BYTES` the memory of each (512 MiB); with
`FAKE_DEVICE_PINS=0` no memory can be pinned. The extension is built on the first import,
in `build/fakedevice` of the checkout.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

NAME = "fakedevice_extension"
COMPILER = "c++"
SOURCES = ("arena.h", "streams.h", "runtime.h", "kernels.h", "extension.cpp")
_HERE = Path(__file__).parent


def _built() -> Any:
    """Returns the extension, built if this checkout has not built these sources for this torch yet."""
    content = b"".join((_HERE / name).read_bytes() for name in SOURCES) + str((torch.__version__, sys.version)).encode()
    path = _HERE.parents[1] / "build" / "fakedevice" / hashlib.sha256(content).hexdigest()[:16] / f"{NAME}.so"
    if not path.exists():
        _build(path)
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None  # it ends with .so
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def _build(path: Path) -> None:
    """Compiles the extension. Not with torch's own builder, which needs ninja, and asks it again in every process."""
    root = Path(torch.__file__).parent
    includes = [root / "include", root / "include" / "torch" / "csrc" / "api" / "include", sysconfig.get_paths()["include"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:  # several processes may build it at once
        made = Path(directory) / path.name
        command = [COMPILER, "-std=c++20", "-O0", "-shared", "-fPIC", f"-DTORCH_EXTENSION_NAME={NAME}"]
        command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", *(f"-isystem{each}" for each in includes)]
        command += [str(_HERE / "extension.cpp"), f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python", "-o", str(made)]
        subprocess.run(command, check=True)
        made.replace(path)


extension = _built()


class _Module(ModuleType):
    """What `torch.fake` is: the functions that torch, and libraries, call on the module of a device."""

    def __init__(self) -> None:
        super().__init__("torch.fake")

    device_count = staticmethod(extension.device_count)
    current_device = staticmethod(extension.current_device)
    is_available = staticmethod(lambda: extension.device_count() > 0)
    is_initialized = staticmethod(extension.initialised)
    unpin = staticmethod(extension.unpin)

    @staticmethod
    def pin(address: int, size: int) -> None:
        if os.environ.get("FAKE_DEVICE_PINS") == "0":
            raise RuntimeError(f"the fake device may not pin {size} bytes")
        extension.pin(address, size)

    @staticmethod
    def set_device(device: int | torch.device) -> None:
        extension.set_device(device if isinstance(device, int) else device.index)

    @staticmethod
    def synchronize(device: Any = None) -> None:
        extension.synchronize(-1 if device is None else torch.device(device).index)

    @staticmethod
    def mem_get_info(device: Any = None) -> tuple[int, int]:
        total, used, _ = extension.memory(extension.current_device() if device is None else torch.device(device).index)
        return total - used, total

    @staticmethod
    def memory_allocated(device: Any = None) -> int:
        _, used, _ = extension.memory(extension.current_device() if device is None else torch.device(device).index)
        return used

    memory_reserved = memory_allocated

    @staticmethod
    def max_memory_allocated(device: Any = None) -> int:
        _, _, peak = extension.memory(extension.current_device() if device is None else torch.device(device).index)
        return peak

    @staticmethod
    def reset_peak_memory_stats(device: Any = None) -> None:
        extension.reset_peak(extension.current_device() if device is None else torch.device(device).index)

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def default_generator(index: int) -> torch.Generator:
        return extension.default_generator(index)

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        for index in range(extension.device_count()):
            extension.default_generator(index).manual_seed(seed)

    @staticmethod
    def get_rng_state(device: Any = "fake") -> torch.Tensor:
        index = torch.device(device).index
        return extension.default_generator(extension.current_device() if index is None else index).get_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: Any = "fake") -> None:
        index = torch.device(device).index
        extension.default_generator(extension.current_device() if index is None else index).set_state(state)


torch.utils.rename_privateuse1_backend("fake")
torch._register_device_module("fake", _Module())
torch.utils.generate_methods_for_privateuse1_backend()


def fail(index: int, why: str) -> None:
    """Breaks a device: every later operation on it raises torch.AcceleratorError."""
    extension.fail(index, why)
