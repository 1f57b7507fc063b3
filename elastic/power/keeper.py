"""Keeps the clocks of some GPUs for one job, and restores them: the core of the guardian and of the daemon.

To restore is to remove the lock: NVML cannot read a lock, so a GPU whose clock somebody else has locked is never taken (`Nvml` says how
that is seen), and what is found is always "not locked". The usual clock, which an operator may have set, is another setting and stays.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from pathlib import Path

from elastic.errors import PowerError
from elastic.power.conditions import Condition, locked_by_somebody, power_error
from elastic.power.nvml import Gpu, Nvml
from elastic.power.records import Owned, Records

_TRIES, _PAUSE_S = 5, 0.05


class Keeper:
    """The clocks of one job on this host. `allowed` are the GPUs that may be changed; None: any."""

    def __init__(self, nvml: Nvml, records: Records, job: str, allowed: Collection[str] | None = None) -> None:
        self._nvml, self._records, self._job, self._allowed = nvml, records, job, allowed
        self._owned: dict[str, Owned] = {}
        self._locked = set[str]()  # also if somebody removes their records
        self._free = set[str]()  # seen to have no lock of somebody else, or locked by this process

    def take(self, uuid: str, own: Collection[int] = ()) -> None:
        """Takes a GPU, and removes what a killed process has left on it. `own` are the processes of the job that may compute on it.

        Raises PowerError: not allowed, shared, locked by somebody else, divided into instances, or lost.
        """
        if uuid in self._owned:
            return
        if self._allowed is not None and uuid not in self._allowed:
            advice = f"start it with --gpu {uuid} too"
            raise power_error(Condition.NO_PERMISSION, f"GPU {uuid} is not on the list of the power daemon", advice=advice)
        gpu = self._nvml.gpu(uuid)
        owned = self._records.own(uuid)
        try:
            gpu.refuse_instances()
            if owned.left:
                gpu.unlock()
                owned.forget()
                self._free.add(uuid)
            else:
                self._look(gpu)
            if others := [pid for pid in gpu.processes() if pid not in own]:
                raise power_error(Condition.SHARED, f"GPU {uuid} is used by other processes too ({', '.join(map(str, others))})")
        except PowerError:
            owned.release()
            self._free.discard(uuid)
            raise
        owned.describe(f"job {self._job} (process {os.getpid()})")
        self._owned[uuid] = owned

    def claim(self, uuid: str, own: Collection[int] = ()) -> None:
        """Takes a GPU, and tries whether its clock may be set: removes a lock that is not there. Raises PowerError.

        A GPU that does not compute may have one of somebody else, which does not show: there the first own lock tells what may be set.
        """
        self.take(uuid, own)
        self.unlock(uuid)
        if uuid in self._free:
            self._nvml.gpu(uuid).unlock()

    def lock(self, uuid: str, mhz: int, own: Collection[int] = ()) -> int:
        """Locks the clock of a GPU, and returns the clock that is read back. Raises PowerError, and then nothing has changed."""
        self.take(uuid, own)
        gpu, owned = self._nvml.gpu(uuid), self._owned[uuid]
        gpu.supported().check(mhz, uuid)
        if uuid not in self._free:
            self._look(gpu, patient=True)
            self._free.add(uuid)
        fresh = not owned.left and uuid not in self._locked
        owned.record(self._job, mhz)
        self._locked.add(uuid)
        try:
            gpu.lock(mhz)
        except PowerError:
            if fresh:
                self._forget(uuid)
            raise
        return gpu.clock_mhz()

    def unlock(self, uuid: str) -> None:
        """Restores the clock of a GPU that was taken. Raises PowerError if the driver does not do it; the record then remains."""
        owned = self._owned.get(uuid)
        if owned is not None and (uuid in self._locked or owned.left):
            self._nvml.gpu(uuid).unlock()
            self._forget(uuid)

    def _look(self, gpu: Gpu, *, patient: bool = False) -> None:
        """Raises PowerError if somebody else has locked the clock."""
        found = gpu.locked_by_other(patient=patient)
        if found.mhz is not None:
            raise locked_by_somebody(gpu.uuid, found.mhz)
        if found.known:
            self._free.add(gpu.uuid)

    def _forget(self, uuid: str) -> None:
        self._locked.discard(uuid)
        self._owned[uuid].forget()

    def close(self) -> list[str]:
        """Restores all clocks and gives the GPUs back. Returns sentences on those that cannot be restored now; their records remain."""
        complaints = []
        for uuid, owned in self._owned.items():
            if (complaint := _insisted(lambda uuid=uuid: self.unlock(uuid))) is not None:
                complaints.append(complaint)
            owned.release()
        self._owned.clear()
        self._locked.clear()
        self._free.clear()
        return complaints


def _insisted(restore: Callable[[], None]) -> str | None:
    """Tries to restore a clock again if the driver is busy. Returns the reason if it cannot be done."""
    for again in range(_TRIES, -1, -1):
        try:
            restore()
            return None
        except PowerError as error:
            if error.condition != Condition.PASSING.value or not again:
                return str(error)
        time.sleep(_PAUSE_S)
    return None


def restore_left(directory: Path, open_nvml: Callable[[], Nvml] = Nvml, known: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """Restores the clocks that killed processes have left, of this boot; GPUs with a living owner are left alone.

    `known` are GPUs that a dead guardian of the caller had locked: they are restored also if somebody has removed their records.

    Returns the GPUs that were restored, and sentences on those that could not be. Raises PowerError if the directory is not ours.
    """
    if not known and not os.path.exists(directory):  # `Path.exists` raises if it may not look
        return [], []
    records = Records(directory)
    restored, complaints = [], []
    nvml: Nvml | None = None
    try:
        for uuid in sorted({*records.uuids(), *known}):
            try:
                owned = records.own(uuid)
            except PowerError:
                continue  # somebody keeps it
            try:
                if owned.left or uuid in known:
                    nvml = nvml or open_nvml()
                    nvml.gpu(uuid).unlock()
                    owned.forget()
                    restored.append(uuid)
            except PowerError as error:
                complaints.append(str(error))
            finally:
                owned.release()
    finally:
        if nvml is not None:
            nvml.close()
    return restored, complaints
