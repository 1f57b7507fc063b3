"""NVML: clocks, locks, power, energy and throttling of GPUs, which are addressed by UUID. Every error is a PowerError with a condition.

NVML can lock a range of clocks and remove the lock, but has no call that reads a lock. What is in force shows in the clock under load and
in the reasons for it. So the runtime records its own locks (`elastic.power.records`), and leaves alone a GPU that somebody else has locked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pynvml

from elastic.errors import PowerError
from elastic.power.conditions import Condition, condition_of, power_error

T = TypeVar("T")

LOOKS, _LOOK_S = 4, 0.1
"""How often a lock of somebody else has to show, and the pause between; assumed, not measured, to be longer than a change of clocks."""

_MOST_LOOKS = 10  # if the GPU waits in some of them

_REASONS = {
    pynvml.nvmlClocksEventReasonGpuIdle: "idle",
    pynvml.nvmlClocksEventReasonApplicationsClocksSetting: "setting",
    pynvml.nvmlClocksEventReasonSwPowerCap: "power cap",
    pynvml.nvmlClocksEventReasonHwSlowdown: "hardware slowdown",
    pynvml.nvmlClocksEventReasonSyncBoost: "sync boost",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "heat",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "heat (hardware)",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "power brake",
    pynvml.nvmlClocksEventReasonDisplayClockSetting: "display",
}

THROTTLES = frozenset(
    {"power cap", "hardware slowdown", "sync boost", "heat", "heat (hardware)", "power brake"},
)
"""Reasons that keep a GPU below the clock that it was asked for."""


def called(what: str, function: Callable[..., T], *arguments: Any) -> T:
    """Calls a function of pynvml. Raises PowerError."""
    try:
        return function(*arguments)
    except pynvml.NVMLError as error:
        raise power_error(condition_of(error.value), what, str(error)) from error  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True, slots=True)
class SupportedClocks:
    """The memory clocks of a GPU, and the graphics clocks that go with the highest of them, in MHz, each descending."""

    memory: tuple[int, ...]
    graphics: tuple[int, ...]

    def check(self, mhz: int, uuid: str) -> None:
        """Raises PowerError if the graphics clock is not supported."""
        if mhz not in self.graphics:
            near = min(self.graphics, key=lambda each: abs(each - mhz), default=None)
            beside = "it supports none" if near is None else f"the nearest of its {len(self.graphics)} clocks is {near} MHz"
            raise power_error(Condition.BAD_CLOCK, f"GPU {uuid} cannot be locked to {mhz} MHz", beside)


@dataclass(frozen=True, slots=True)
class ClockLook:
    """A look at the graphics clock: its MHz, the reasons for it, and whether a GPU that nobody has locked would have another one."""

    mhz: int
    reasons: frozenset[str]
    limited: bool

    @property
    def tells(self) -> bool:
        """Whether a lock would show: the GPU computes, and nothing else keeps its clock low."""
        return not self.reasons & (THROTTLES | {"idle"})


@dataclass(frozen=True, slots=True)
class ForeignLock:
    """What is known of a lock that somebody else may have set: its MHz if there is one. Nothing is `known` if the GPU did not compute."""

    known: bool
    mhz: int | None = None


class Nvml:
    """A session with the driver. Raises PowerError if there is no library or driver."""

    def __init__(self) -> None:
        called("NVML cannot be used", pynvml.nvmlInit)

    def close(self) -> None:
        """Ends the session; a driver that is gone by then is no error."""
        try:
            called("NVML cannot be closed", pynvml.nvmlShutdown)
        except PowerError:
            return

    def uuids(self) -> list[str]:
        """Returns the UUIDs of all GPUs that answer."""
        found = []
        for index in range(called("GPUs cannot be counted", pynvml.nvmlDeviceGetCount)):
            try:
                handle = called(f"GPU number {index} cannot be used", pynvml.nvmlDeviceGetHandleByIndex, index)
                found.append(str(called(f"GPU number {index} has no UUID", pynvml.nvmlDeviceGetUUID, handle)))
            except PowerError as error:
                if error.condition != Condition.LOST_GPU.value:
                    raise
        return found

    def gpu(self, uuid: str) -> Gpu:
        """Returns the GPU with this UUID. Raises PowerError: no such GPU, lost, or an instance of a MIG."""
        if uuid.startswith("MIG-"):
            raise power_error(Condition.MIG, f"{uuid} is an instance of a GPU")
        return Gpu(uuid, called(f"GPU {uuid} cannot be used", pynvml.nvmlDeviceGetHandleByUUID, uuid))


class Gpu:
    """One GPU. Every call raises PowerError if it fails."""

    def __init__(self, uuid: str, handle: Any) -> None:
        self.uuid, self._handle = uuid, handle

    def _call(self, what: str, function: Callable[..., T], *arguments: Any) -> T:
        return called(f"GPU {self.uuid}: {what}", function, self._handle, *arguments)

    def name(self) -> str:
        """Returns the name of the product."""
        return str(self._call("its name cannot be read", pynvml.nvmlDeviceGetName))

    def supported(self) -> SupportedClocks:
        """Returns the clocks to which it can be locked."""
        memory = self._call("its memory clocks cannot be read", pynvml.nvmlDeviceGetSupportedMemoryClocks)
        if not memory:
            return SupportedClocks((), ())
        graphics = self._call("its clocks cannot be read", pynvml.nvmlDeviceGetSupportedGraphicsClocks, max(memory))
        return SupportedClocks(tuple(sorted(memory, reverse=True)), tuple(sorted(set(graphics), reverse=True)))

    def lock(self, mhz: int) -> None:
        """Locks the graphics clock; takes some to some hundred milliseconds. The clock must be a supported one."""
        self.supported().check(mhz, self.uuid)
        self.refuse_instances()
        self._call(f"it cannot be locked to {mhz} MHz", pynvml.nvmlDeviceSetGpuLockedClocks, mhz, mhz)

    def unlock(self) -> None:
        """Removes a lock of the graphics clock, also one that somebody else has set."""
        self._call("its clock cannot be unlocked", pynvml.nvmlDeviceResetGpuLockedClocks)

    def refuse_instances(self) -> None:
        """Raises PowerError (MIG) if the GPU is divided into instances, all of which have the same clock."""
        try:
            current, _ = self._call("its mode cannot be read", pynvml.nvmlDeviceGetMigMode)
        except PowerError as error:
            if error.condition in (Condition.NOT_SUPPORTED.value, Condition.NO_FUNCTION.value):
                return  # it has no such mode
            raise
        if current:
            raise power_error(Condition.MIG, f"GPU {self.uuid} is divided into instances")

    def clock_mhz(self) -> int:
        """Returns the present graphics clock, which is low while the GPU is idle and not locked."""
        return self._call("its clock cannot be read", pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_GRAPHICS)

    def memory_mhz(self) -> int:
        """Returns the present memory clock."""
        return self._call("its memory clock cannot be read", pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_MEM)

    def usual_mhz(self) -> int:
        """Returns the application clock, or the highest: many GPUs run above their application clock while they compute."""
        try:
            return self._call("its clock cannot be read", pynvml.nvmlDeviceGetApplicationsClock, pynvml.NVML_CLOCK_GRAPHICS)
        except PowerError as error:
            if error.condition not in (Condition.NOT_SUPPORTED.value, Condition.NO_FUNCTION.value):
                raise
        return self._call("its highest clock cannot be read", pynvml.nvmlDeviceGetMaxClockInfo, pynvml.NVML_CLOCK_GRAPHICS)

    def power_w(self) -> float:
        """Returns the present power in watts, as it is read: a wrong sensor may give anything."""
        milliwatts = self._call("its power cannot be read", pynvml.nvmlDeviceGetPowerUsage)
        return (milliwatts - (1 << 32) if milliwatts >> 31 else milliwatts) / 1000

    def energy_mj(self) -> int:
        """Returns the energy counter in millijoules, which began when the driver was loaded."""
        return self._call("its energy cannot be read", pynvml.nvmlDeviceGetTotalEnergyConsumption)

    def reasons(self) -> frozenset[str]:
        """Returns why the clock is no higher; `THROTTLES` are those that nobody asked for."""
        try:
            bits = self._call("its throttling cannot be read", pynvml.nvmlDeviceGetCurrentClocksEventReasons)
        except PowerError as error:
            if error.condition != Condition.NO_FUNCTION.value:
                raise
            bits = self._call("its throttling cannot be read", pynvml.nvmlDeviceGetCurrentClocksThrottleReasons)
        return frozenset(name for bit, name in _REASONS.items() if bits & bit)

    def ecc_errors(self, *, uncorrected: bool) -> int:
        """Returns the errors of its memory since the driver was loaded."""
        kind = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED if uncorrected else pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED
        return self._call("its ECC errors cannot be read", pynvml.nvmlDeviceGetTotalEccErrors, kind, pynvml.NVML_VOLATILE_ECC)

    def retired_pages(self) -> int:
        """Returns how many pages of its memory are out of use, for errors of either kind."""
        causes = (pynvml.NVML_PAGE_RETIREMENT_CAUSE_MULTIPLE_SINGLE_BIT_ECC_ERRORS, pynvml.NVML_PAGE_RETIREMENT_CAUSE_DOUBLE_BIT_ECC_ERROR)
        return sum(len(self._call("its retired pages cannot be read", pynvml.nvmlDeviceGetRetiredPages, cause)) for cause in causes)

    def remapped_rows(self) -> int:
        """Returns how many rows of its memory are replaced by spare ones, for errors of either kind."""
        corrected, uncorrected, *_ = self._call("its remapped rows cannot be read", pynvml.nvmlDeviceGetRemappedRows)
        return corrected + uncorrected

    def watch_xids(self, events: Any) -> None:
        """Adds its Xid events to a set of events."""
        self._call("its Xid events cannot be watched", pynvml.nvmlDeviceRegisterEvents, pynvml.nvmlEventTypeXidCriticalError, events)

    def processes(self) -> Sequence[int]:
        """Returns the processes that compute on it, as far as the driver shows them: in a container it may show none."""
        return [each.pid for each in self._call("its processes cannot be read", pynvml.nvmlDeviceGetComputeRunningProcesses)]

    def look(self) -> ClockLook:
        """Looks at the clock, which shows a lock only while the GPU computes. It may begin or end work meanwhile: that tells nothing.

        A GPU that is neither idle nor throttled runs at its application clock, or above it without a setting that limits it. A lock above
        the application clock that the driver does not give as a reason is not seen.
        """
        before, now_mhz, usual_mhz = self.reasons(), self.clock_mhz(), self.usual_mhz()
        reasons = before | self.reasons()
        limited = now_mhz < usual_mhz or (now_mhz > usual_mhz and "setting" in reasons)
        return ClockLook(now_mhz, reasons, limited)

    def locked_by_other(self, *, patient: bool = False) -> ForeignLock:
        """Returns what is known of a lock of somebody else. Call it before the first own lock.

        A GPU that begins work shows other clocks for a moment, so a lock has to show `LOOKS` times, and in each look that tells something.
        It may show as more than one clock: within a range, a GPU has the highest one while it computes and a lower one while it waits, and
        then it may say that it is idle. The highest is returned. A GPU that is idle at the first look is not known, unless `patient`.
        """
        highest = told = 0
        for number in range(_MOST_LOOKS if patient else LOOKS):
            if number:
                time.sleep(_LOOK_S)
            look = self.look()
            if look.tells and not look.limited:
                return ForeignLock(known=True)
            if look.tells:
                highest, told = max(highest, look.mhz), told + 1
            elif not patient:
                break
            if told == LOOKS:
                return ForeignLock(known=True, mhz=highest)
        return ForeignLock(known=False)
