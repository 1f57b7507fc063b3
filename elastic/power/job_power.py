"""The clocks and the energy of a job on this host: a thread of its agent, which reads NVML, sets clocks, and never delays a step.

The agent's loop passes on what it hears; `Cycle` decides; the thread does. Everything that fails here is reported in one line, and the
training goes on.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from elastic.errors import PowerError
from elastic.host.channel import Message
from elastic.observe.gpu_health import GpuHealth
from elastic.plan.clock_change import Clocking
from elastic.plan.clocks import Clocked, Mode
from elastic.power import energy_file
from elastic.power.clocks import Clocks
from elastic.power.conditions import Condition
from elastic.power.cycle import Cycle, Orders
from elastic.power.gpu_facts import GpuFacts
from elastic.power.gpu_faults import GpuFaults
from elastic.power.meter import Meter
from elastic.power.nvml import THROTTLES, Gpu, Nvml
from elastic.power.windows import Report
from elastic.settings import clocks_directory, power_socket
from elastic.view import View

MODES: dict[str, Mode] = {"speed": "speed", "energy": "energy"}
"""The modes by the value of `dvfs=`; with another one clocks are only measured."""

_LOOK_S = 0.2
_LATE_S = 0.5
"""Reports that are older do not count: the energy counter is read when they are handled, and has moved on."""


@dataclass(slots=True)
class _Device:
    """A worker's GPU, with its meter and the worker's process."""

    gpu: Gpu
    meter: Meter
    pid: Callable[[], int | None]
    counts: bool = True  # it has an energy counter
    lost: bool = False


@dataclass(slots=True)
class _Effort:
    """A worker's seconds in its layers in one view, as if its clock was always the usual one."""

    epoch: int
    computed_s: float = 0.0
    usual_s: float = 0.0


class JobPower:
    """Measures the GPUs that workers name and, with a mode, sets their clocks. `say` may be called from the thread."""

    def __init__(self, job: str, mode: Mode | None, directory: Path, say: Callable[[str], None]) -> None:
        self._job, self._directory, self._say = job, directory, say
        self.cycle = Cycle(mode)
        self._wanted = mode
        self._todo: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._over = False  # the thread has ended: nobody would take what is posted
        self._nvml: Nvml | None = None
        self._clocks: Clocks | None = None
        self._devices: dict[int, _Device] = {}
        self._faults = GpuFaults()
        self._efforts: dict[int, _Effort] = {}
        self._tokens = 0
        self._frontier: tuple[Clocked, ...] = ()
        self._drawn_for: tuple[int, int, float] | None = None  # epoch, number of models and delay of messages of the frontier
        self._clocking: Clocking | None = None
        self._view: View | None = None
        self._missed = False  # the user was told which worker has no GPU
        self._reads, self._reading_s, self._reading_cpu_s, self._began = 0, 0.0, 0.0, time.monotonic()

    # Calls from the agent's loop

    def use(self, worker: int, uuid: str, pid: Callable[[], int | None]) -> None:
        """Handles a worker that names its GPU. Its process may not be known yet."""
        self._post(lambda: self._use(worker, uuid, pid))

    def committed(self, view: View) -> None:
        """Handles a committed view."""
        self._view = view
        if self._thread is not None:
            self._post(lambda: self._commit(view))
        elif self._wanted is not None:
            self._miss(view)  # a worker names its GPU before it is ready for a view

    def heard(self, worker: int, progress: Message) -> Message:
        """Handles a worker's report. Returns it with the seconds in its layers as they would be at the usual clock."""
        effort, at = progress.get("effort"), progress.get("committed_at")
        if self._thread is None or self._over or effort is None:
            return progress
        if at is not None:
            step, epoch, tokens = progress["step"], progress["epoch"], progress.get("tokens", 0)
            self._post(lambda: self._report(worker, epoch, step, at, effort, tokens))
        known = self._efforts.get(worker)
        if known is None or known.epoch != progress["epoch"]:
            known = self._efforts[worker] = _Effort(progress["epoch"])
        known.usual_s += (effort[0] - known.computed_s) / self.cycle.stretch(worker)
        known.computed_s = effort[0]
        return {**progress, "effort": [known.usual_s, *effort[1:]]}

    def ended(self, worker: int) -> None:
        """Handles the end of a worker's process."""
        self._efforts.pop(worker, None)
        if self._thread is not None:
            self._post(lambda: self._forget(worker))

    def clocking(self) -> Clocking | None:
        """Returns the mode and the known clocks, for the next plan; None if no clock may be set, or none is known."""
        return self._clocking

    def health(self, worker: int) -> GpuHealth | None:
        """Returns what the GPU of a lost worker has counted; None if it is not read yet. Never waits."""
        return self._faults.of(worker)

    def close(self) -> None:
        """Restores all clocks, and ends the thread."""
        if self._thread is not None:
            self._todo.put(None)
            self._thread.join(30.0)

    # The thread

    def _post(self, act: Callable[[], None]) -> None:
        if self._over:
            return
        self._todo.put(act)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="elastic-power", daemon=True)
            self._thread.start()
            if self._view is not None:
                self.committed(self._view)

    def _run(self) -> None:
        try:
            self._nvml = Nvml()
            looked = time.monotonic()
            while (act := self._next()) is not None:
                act()
                if time.monotonic() - looked >= _LOOK_S:
                    looked = time.monotonic()
                    self._look()
        except PowerError as error:
            self._say(f"the energy of GPUs is not measured, and no clock is set: {error}")
        except Exception:  # the thread's boundary: a bug here must not end the training
            self._say(f"clocks and energy are not looked after any more; the training goes on:\n{traceback.format_exc()}")
        finally:
            self._over, self._clocking = True, None
            self._restore()
            self._faults.close()
            if self._nvml is not None:
                self._nvml.close()

    def _next(self) -> Callable[[], None] | None:
        try:
            return self._todo.get(timeout=_LOOK_S)
        except queue.Empty:
            return lambda: None

    def _restore(self) -> None:
        if self._clocks is not None:
            for complaint in self._clocks.close():
                self._say(f"a clock is not restored: {complaint}")
            self._clocks = None

    def _use(self, worker: int, uuid: str, pid: Callable[[], int | None]) -> None:
        assert self._nvml is not None
        if (known := self._devices.get(worker)) is not None and known.gpu.uuid == uuid:
            return  # it names it again
        try:
            gpu = self._nvml.gpu(uuid)
            self._faults.begin(worker, gpu)
            facts = GpuFacts(uuid=uuid, clocks=gpu.supported(), usual_mhz=gpu.usual_mhz(), idle_w=_idle_w(gpu))
        except PowerError as error:
            lost = "the energy of the job is not known"
            if self.cycle.mode is None:
                self._say(f"worker {worker}: {error}; {lost}")
            else:
                self._stop(f"worker {worker}: {error}; {lost}, and no clock is set")
            return
        sharing = [other for other, device in self._devices.items() if device.gpu.uuid == uuid]
        self._devices[worker] = _Device(gpu, Meter(), pid)
        if sharing and self.cycle.mode is not None:
            self._stop(f"GPU {uuid} is used by workers {sharing[0]} and {worker}: no clock is changed")
        if facts.clocks.graphics and facts.usual_mhz not in facts.clocks.graphics:
            facts = GpuFacts(uuid=uuid, clocks=facts.clocks, usual_mhz=facts.nearest(facts.usual_mhz), idle_w=facts.idle_w)
        if not facts.clocks.graphics and self.cycle.mode is not None:
            self._stop(f"GPU {uuid} has no clocks that could be set")
        self._obey(self.cycle.known(worker, facts, time.monotonic()))
        self._share()

    def _commit(self, view: View) -> None:
        self._obey(self.cycle.committed(view, time.monotonic()))
        if self.cycle.mode is not None:
            self._miss(view)

    def _miss(self, view: View) -> None:
        """Tells the user once if workers have not named their GPUs: then the clocks wait for them."""
        missing = [worker for worker in view.workers if worker not in self._devices]
        if missing and not self._missed:
            self._missed = True
            who = "no worker has" if len(missing) == len(view.workers) else f"worker {missing[0]} has not"
            self._say(
                f'dvfs="{self._wanted}" changes no clock: {who} named its GPU; call job.use_gpu(uuid) in the train function before its '
                "Trainer is made (a worker whose Trainer uses CUDA does it by itself)"
            )

    def _forget(self, worker: int) -> None:
        """Restores the clock of a worker that has ended; the one that takes its GPU over gets one with its view."""
        self._faults.end(worker)
        self.cycle.forget(worker)
        device = self._devices.pop(worker, None)
        if device is not None and self._clocks is not None:
            try:
                self._clocks.unlock(device.gpu.uuid)
            except PowerError as error:
                self._refused(error, "no clock is set any more")

    def _report(self, worker: int, epoch: int, step: int, at: float, effort: list[float], tokens: int) -> None:
        if self.cycle.view is None or epoch != self.cycle.view.epoch or time.monotonic() - at > _LATE_S:
            return
        self._tokens = tokens or self._tokens
        with self._timed():
            joules = self._read(worker)
            self._notice_clock(worker)
        self._reads += 1
        before = self.cycle.figures
        self._obey(self.cycle.noted(worker, Report(step, at, effort[0], effort[2], joules), time.monotonic()))
        if self.cycle.figures is not before:
            self._refresh()

    def _refresh(self) -> None:
        """Makes what has been measured known to the planner and to the user."""
        self._share()
        drawn_for = (0 if self.cycle.view is None else self.cycle.view.epoch), len(self.cycle.choices), self.cycle.message_s
        if drawn_for != self._drawn_for:
            self._drawn_for, self._frontier = drawn_for, tuple(self.cycle.frontier())
        self._write()

    def _share(self) -> None:
        """Makes the known clocks known to the planner; it reads this from another thread."""
        mode = self.cycle.mode
        self._clocking = self.cycle.clocking(mode) if mode == "energy" or (mode is not None and self.cycle.choices) else None

    def _write(self) -> None:
        faults = {device.gpu.uuid: device.meter.fault for device in self._devices.values() if device.meter.fault is not None}
        content = energy_file.described(self._job, self.cycle, self._tokens, faults, self._frontier)
        took = {"seconds": self._reading_s, "cpu_s": self._reading_cpu_s}  # with the waits for locks and for the interpreter, and without
        reading = {"reads": self._reads, **took, "of_s": time.monotonic() - self._began}
        energy_file.write(self._directory, {**content, "reading": reading})

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began, began_cpu = time.perf_counter(), time.thread_time()
        yield
        self._reading_s += time.perf_counter() - began
        self._reading_cpu_s += time.thread_time() - began_cpu

    def _read(self, worker: int) -> float | None:
        """Reads a GPU's counter. Returns its joules so far; None if they are not known."""
        device = self._devices.get(worker)
        if device is None or device.lost:
            return None
        try:
            if device.counts:
                device.meter.counter(device.gpu.energy_mj(), time.monotonic())
            else:
                device.meter.power(device.gpu.power_w(), time.monotonic())
        except PowerError as error:
            self._unreadable(worker, device, error)
        return None if device.lost or device.meter.fault is not None else device.meter.joules

    def _unreadable(self, worker: int, device: _Device, error: PowerError) -> None:
        condition = Condition(error.condition)
        if device.counts and condition in (Condition.NOT_SUPPORTED, Condition.NO_FUNCTION):
            device.counts = False  # older GPUs have a power sensor only
        elif not condition.passes:
            device.lost = True
            self._say(f"the energy of worker {worker} is not measured any more; the training goes on: {error}")
            if condition.gone and self.cycle.mode is not None:
                self._stop("no clock is set any more")

    def _notice_clock(self, worker: int) -> None:
        device, clock = self._devices.get(worker), self.cycle.clocks.get(worker)
        if device is None or device.lost or (clock is None and not self.cycle.looks):
            return
        try:
            if clock is None:
                self.cycle.saw(worker, device.gpu.look())
            elif device.gpu.reasons() & THROTTLES and (now_mhz := device.gpu.clock_mhz()) < clock:
                self.cycle.throttled(worker, now_mhz, time.monotonic())
        except PowerError:
            return  # reading its energy says so

    def _look(self) -> None:
        """Reads GPUs without a counter, takes Xid events, and replaces a guardian that has died."""
        with self._timed():
            self._faults.look()
            for worker, device in list(self._devices.items()):
                if not device.counts:
                    self._read(worker)
        if self._clocks is not None and self._clocks.lost:
            self._renew()

    def _renew(self) -> None:
        assert self._clocks is not None
        try:
            complaints = self._clocks.renew()
        except PowerError as error:
            self._stop(str(error))
            return
        done = "; ".join(complaints) or "another one has restored them, and they are set again"
        self._say(f"the process that keeps the clocks has died; {done}")
        self._obey(Orders(clocks=self.cycle.clocks))

    def _obey(self, orders: Orders) -> None:
        """Sets clocks, and tells the user."""
        if orders.say is not None:
            self._say(orders.say)
        if not orders.clocks:
            return
        for worker, clock in orders.clocks.items():
            device = self._devices.get(worker)
            if device is None or self._wanted is None:
                continue
            try:
                self._set(device, clock)
            except PowerError as error:
                self._refused(error, "no clock is changed")
                return
        self.cycle.obeyed(time.monotonic())

    def _refused(self, error: PowerError, meaning: str) -> None:
        """Replaces a guardian that has died, and sets the clocks again; after any other error no clock is set any more."""
        if Condition(error.condition).passes and self._clocks is not None and self._clocks.lost:
            self._renew()
        else:
            self._stop(f"{meaning}: {error}")

    def _set(self, device: _Device, clock: int | None) -> None:
        if self._clocks is None and self.cycle.mode is None:
            return
        if self._clocks is None:
            self._clocks = Clocks(self._job, clocks_directory(), power_socket())
        own = [pid for each in self._devices.values() if (pid := each.pid()) is not None]
        if clock is None:
            self._clocks.claim(device.gpu.uuid, own)
        else:
            self._clocks.lock(device.gpu.uuid, clock, own)

    def _stop(self, why: str) -> None:
        """Restores all clocks; from now on they are only measured."""
        self._clocking = None
        self._restore()
        self._obey(self.cycle.stopped(why))


def _idle_w(gpu: Gpu) -> float:
    """Returns the watts of a GPU on which nothing runs yet; 0 if they cannot be read."""
    try:
        return max(0.0, gpu.power_w())
    except PowerError:
        return 0.0
