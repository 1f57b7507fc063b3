"""The conditions that NVML's error codes name, and the advice for each."""

from __future__ import annotations

from enum import Enum

import pynvml

from elastic.errors import PowerError


class Condition(str, Enum):
    """Why a GPU's clocks or power cannot be read or set."""

    NO_PERMISSION = "no permission"
    NOT_SUPPORTED = "not supported"
    UNINITIALISED = "uninitialised"
    NO_LIBRARY = "library not found"
    NO_FUNCTION = "function not found"
    NO_DRIVER = "driver not loaded"
    VERSIONS = "driver and library differ"
    NO_GPU = "no such GPU"
    LOST_GPU = "lost GPU"
    MIG = "MIG"
    BAD_CLOCK = "clock not supported"
    SHARED = "shared GPU"
    NO_RECORD = "no record"
    PASSING = "temporary"
    UNKNOWN = "unknown"

    @property
    def passes(self) -> bool:
        """Whether the same call may succeed later."""
        return self is Condition.PASSING

    @property
    def gone(self) -> bool:
        """Whether nothing can be read from this GPU any more."""
        return self in _GONE


_GONE = {Condition.UNINITIALISED, Condition.NO_LIBRARY, Condition.NO_DRIVER, Condition.VERSIONS, Condition.LOST_GPU, Condition.NO_GPU}

_OF_CODE = {
    pynvml.NVML_ERROR_UNINITIALIZED: Condition.UNINITIALISED,
    pynvml.NVML_ERROR_INVALID_ARGUMENT: Condition.BAD_CLOCK,
    pynvml.NVML_ERROR_NOT_SUPPORTED: Condition.NOT_SUPPORTED,
    pynvml.NVML_ERROR_NO_PERMISSION: Condition.NO_PERMISSION,
    pynvml.NVML_ERROR_NOT_FOUND: Condition.NO_GPU,
    pynvml.NVML_ERROR_INSUFFICIENT_POWER: Condition.LOST_GPU,
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: Condition.NO_DRIVER,
    pynvml.NVML_ERROR_TIMEOUT: Condition.PASSING,
    pynvml.NVML_ERROR_IRQ_ISSUE: Condition.LOST_GPU,
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: Condition.NO_LIBRARY,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: Condition.NO_FUNCTION,
    pynvml.NVML_ERROR_GPU_IS_LOST: Condition.LOST_GPU,
    pynvml.NVML_ERROR_RESET_REQUIRED: Condition.LOST_GPU,
    pynvml.NVML_ERROR_OPERATING_SYSTEM: Condition.NO_PERMISSION,
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: Condition.VERSIONS,
    pynvml.NVML_ERROR_IN_USE: Condition.PASSING,
    pynvml.NVML_ERROR_MEMORY: Condition.PASSING,
    pynvml.NVML_ERROR_NO_DATA: Condition.PASSING,
    pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES: Condition.PASSING,
    pynvml.NVML_ERROR_FREQ_NOT_SUPPORTED: Condition.BAD_CLOCK,
    pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH: Condition.NO_FUNCTION,
    pynvml.NVML_ERROR_DEPRECATED: Condition.NO_FUNCTION,
    pynvml.NVML_ERROR_NOT_READY: Condition.PASSING,
    pynvml.NVML_ERROR_GPU_NOT_FOUND: Condition.NO_GPU,
    pynvml.NVML_ERROR_INVALID_STATE: Condition.NOT_SUPPORTED,
}

_ADVICE = {
    Condition.NO_PERMISSION: "start `elastic power-daemon` as root, or run the job as a user who may set clocks",
    Condition.NOT_SUPPORTED: "this GPU or its mode has no such setting or reading",
    Condition.UNINITIALISED: "the driver was reloaded, or NVML was shut down",
    Condition.NO_LIBRARY: "install NVIDIA's driver, whose libnvidia-ml.so.1 is needed",
    Condition.NO_FUNCTION: "this driver is too old or too new for the call",
    Condition.NO_DRIVER: "load NVIDIA's driver",
    Condition.VERSIONS: "the driver was updated: reload it, or reboot",
    Condition.NO_GPU: "compare with the UUIDs that `nvidia-smi -L` prints",
    Condition.LOST_GPU: "the GPU has failed or fallen off the bus: reset it, or reboot",
    Condition.MIG: "clocks would change for all instances of this GPU: they are left alone",
    Condition.BAD_CLOCK: "use a clock of the supported list",
    Condition.SHARED: "its clocks are left alone",
    Condition.NO_RECORD: "give this user a directory of its own there, mode 0700, with free space, or name another one in ELASTIC_CLOCKS",
    Condition.PASSING: "the driver was busy, or did not answer in time",
}


def condition_of(code: int) -> Condition:
    """Returns the condition of an error code of NVML."""
    return _OF_CODE.get(code, Condition.UNKNOWN)


def power_error(condition: Condition, what: str, detail: str = "", advice: str | None = None) -> PowerError:
    """Makes the error: what could not be done, its condition with NVML's own words, and what to do (the condition's advice by default)."""
    advice = advice or _ADVICE.get(condition)
    said = f"{what}: {condition.value}{f' ({detail})' if detail else ''}"
    return PowerError(said + (f"; {advice}" if advice else ""), condition=condition.value)


def locked_by_somebody(uuid: str, mhz: int) -> PowerError:
    """Makes the error for a GPU whose clock somebody else has locked."""
    return power_error(Condition.SHARED, f"the clock of GPU {uuid} is locked to {mhz} MHz by somebody else")
