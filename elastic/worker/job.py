"""A worker's view of its job: the object that `train_fn` receives, and the worker's messages from and to the agent."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

from elastic.comm.tls import Tls
from elastic.errors import Interrupted, NotInJob, TrainerError
from elastic.host.channel import MAPPED
from elastic.host.packed import unpacked
from elastic.host.rundir import LINKS, RunDirectory
from elastic.memory.segment import MappedSegment, OwnSegment
from elastic.observe.activity import AGENT, LOADER, Activity
from elastic.observe.trace_file import TraceFile
from elastic.settings import JobSettings
from elastic.view import View
from elastic.worker.told_steps import ToldSteps

P = ParamSpec("P")
T = TypeVar("T")
SendMessage = Callable[[dict[str, Any]], None]

_ORDERS = ("view", "quiesce", "propose")
UNHEARD_S = 20.0
"""Seconds that `train_fn` may take to handle an exception of the training before it counts as swallowed."""
_PROGRESS_EVERY_S = 0.25
_current: Job | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """The start parameters that the agent sends to a new worker. `first`: it measures the layers' costs, and leads until there is a view.
    `joins`: the job has a view already. `interface` is the IP address at which workers of other hosts reach it, None on one host;
    `tls` has the fields of `elastic.comm.tls.Credentials` if links with them are encrypted. `slot` is the lowest number that no other live
    worker of the host has: it says which device the worker gets.

    `import_path` and `argv` are the launcher's, so that imports work as they do there. `modules` are the files of the user's top-level
    modules that the launcher has imported. `bar`: a progress bar stands on the terminal. `trace`: phases are recorded.
    """

    worker: int
    host: str
    directory: str
    secret: str  # hexadecimal
    settings: JobSettings
    slot: int = 0
    first: bool = False
    joins: bool = False
    interface: str | None = None
    tls: dict[str, str] | None = field(default=None, repr=False)
    import_path: tuple[str, ...] = ()
    argv: tuple[str, ...] = ()
    modules: dict[str, str] = field(default_factory=dict)
    bar: bool = False
    trace: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "worker": self.worker,
            "host": self.host,
            "directory": self.directory,
            "secret": self.secret,
            "settings": self.settings.to_json(),
            "slot": self.slot,
            "first": self.first,
            "joins": self.joins,
            "interface": self.interface,
            "tls": self.tls,
            "import_path": self.import_path,
            "argv": self.argv,
            "modules": self.modules,
            "bar": self.bar,
            "trace": self.trace,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> WorkerSpec:
        lists = {name: tuple(data[name]) for name in ("import_path", "argv")}
        return cls(**{**data, **lists, "settings": JobSettings.from_json(data["settings"])})


class Waits(Protocol):
    """A worker's waits for others, which an order of the agent can interrupt."""

    def interrupt(self, error: BaseException) -> None: ...
    def resume(self) -> None: ...


class Job:
    """The running job, seen from one of its workers.

    `worker` is this process's id, `workers` the number that was asked for, `threads` the number that torch uses, `host` the machine's name.
    `device` is what it computes on, such as `cuda:0`: a model is built there or on the CPU. `secret` authenticates links, `directory` is
    private to the job and removed at its end. `profile`: this worker measures the layers' costs.
    """

    def __init__(self, spec: WorkerSpec, send: SendMessage) -> None:
        self.settings = spec.settings
        self.name = spec.settings.name
        self.worker = spec.worker
        self.workers = spec.settings.workers
        self.threads = spec.settings.threads
        self.host = spec.host
        self.interface = spec.interface
        self.directory = spec.directory
        self.links = os.path.join(spec.directory, LINKS)
        self.secret = bytes.fromhex(spec.secret)
        self.tls = Tls.of(spec.tls)
        self.exact = spec.settings.exact
        self.profile = self._first = spec.first
        self.joins = spec.joins  # this worker joins a running job
        self.stop_requested = False  # after the first Ctrl-C: stop at the next step boundary
        self.pause_requested = False  # the members will change: pause at the next step boundary
        self.dismissed = threading.Event()  # every worker has finished: this one may exit
        self.recovers = True  # the agent orders what to do when members are lost
        self.view: View | None = None
        self.epoch = 0
        self.step: int | None = None
        self.send = send
        self.give_up: Callable[[BaseException], None] = lambda error: None
        self._unheard: BaseException | None = None
        self._orders: list[dict[str, Any]] = []
        self._ordered = threading.Condition()
        self._waits: Waits | None = None
        self._thread = threading.get_ident()  # the training thread
        self._told_at = 0.0
        self.steps = ToldSteps(send, lambda: self.leader)
        self._activity = Activity(Path(spec.directory), spec.worker)
        self.waits = self._activity.waits  # for whom the training thread waits
        self.trace = TraceFile(RunDirectory(Path(spec.directory)).trace, spec.worker) if spec.trace else None
        if self.trace is not None:
            self.waits = self._waits_traced
        self.pulse = self._activity.pulse  # Python code runs here
        self.phase_delay: Callable[[str, int], None] | None = None  # called after each phase begins
        self.segment: OwnSegment | None = None  # memory that outlives this process
        self.segments: dict[int, MappedSegment] = {}  # those of other workers of this host, also of dead ones
        self.gpu: str | None = None  # the UUID of the GPU that this worker uses
        self.device = "cpu"  # what this worker computes on, such as "cuda:0"
        self.trains = False  # whether this worker has a Trainer
        self.clips: Callable[[float], None] | None = None  # of a plain loop
        self.weighs: Callable[[Any, Any], Any] | None = None  # of a plain loop
        self.behind: Callable[[Any], None] | None = None  # called with the value that `train_fn` returned
        self.model: dict[str, Any] | None = None  # what `train_fn` has made of the model behind the last loop

    def use_gpu(self, uuid: str) -> None:
        """Names the GPU that this worker computes on by its UUID, as `nvidia-smi -L` prints it: for `dvfs=` and `elastic energy`.

        A worker that uses CUDA when its Trainer is made need not call it. Call it before, once. Raises TrainerError if it is no UUID.
        """
        if not (isinstance(uuid, str) and uuid.isascii() and uuid.startswith(("GPU-", "MIG-"))):
            raise TrainerError(f"job.use_gpu({uuid!r}): give the UUID of a GPU as `nvidia-smi -L` prints it, such as 'GPU-8d2c...'")
        self.gpu = uuid
        self.send({"type": "gpu", "uuid": uuid})

    def prepare(
        self,
        *given: Any,
        model: Any = None,
        optimizer: Any = None,
        data: Any = None,
        micro_batch_size: int,
        batch_size: int | None = None,
        scheduler: Any = None,
        steps: int | None = None,
        epochs: int | None = None,
        seed: int = 0,
        collate: Callable[[list[Any]], Any] | None = None,
        **options: Any,
    ) -> tuple[Any, ...]:
        """Returns model, optimizer and a loader for a plain loop: what is given, in the same order. Every worker calls it once.

        The loop's body runs on each micro-batch of a step that this worker has: forward, loss, `backward`, `optimizer.step()`. The step's
        gradient is the mean over its micro-batches; the update is made, once a step, inside the `optimizer.step()` of its last body. Behind
        that, `loader.report` is the step's report, and None in all other bodies: that is where to print, evaluate, save or leave the loop.

        With several optimizers, as in `job.prepare(generator, discriminator, opt_g, opt_d, loader, ...)`, a body may make several updates:
        each `backward` behind a step begins another one. Each update is that of a plain loop over the whole batch: it has the mean over
        all micro-batches, and what is computed behind it sees its parameters. For that, the body is run again for each update.

        Before the first step each worker tries the body out on the first micro-batch, once or twice; nothing of that counts.

        Args:
            given: models, optimizers, schedulers and the data, in any order; or lists of models, of optimizers and of schedulers. They may
                be named instead: `model=`, `optimizer=`, `data=`, `scheduler=`.
            model: any module; the body calls it. The parameters of several models are called `0.weight`, `1.weight` and so on.
            optimizer: a fresh `torch.optim.Optimizer` over its parameters.
            data: a map-style dataset, which is shuffled by `seed`; an iterable one, which every worker reads in order; a DataLoader, whose
                dataset, batch_size, collate_fn, shuffle= and num_workers are taken; or a function `batch(step, micro_batch)`.
            micro_batch_size: samples of one body. It decides bits, and does not depend on the number of workers.
            batch_size: samples of one update, of all workers together; by default the DataLoader's.
            scheduler: a scheduler of that optimizer. Its `step()` acts where `loader.report` is not None, and after a loop.
            steps: the length of one loop over the loader, in steps.
            epochs: the same in epochs of the data; by default one, where `steps` is not given.
            seed: keys the order of data, and what bodies draw from torch's, NumPy's and Python's generators.
            collate: joins samples of a dataset.
            options: `exact`, `grains`, `on_nonfinite`, `checkpoint`, `every`, `keep`, `checkpoint_files`, `names`, as for `Trainer`.

        Raises:
            TrainerError: if any of these cannot be trained; the message names the remedy.
        """
        from elastic.worker.plain.arguments import sort  # imports torch
        from elastic.worker.plain.prepare import prepare

        found = sort(given, model, optimizer, data, scheduler)
        sizes = {"micro_batch_size": micro_batch_size, "batch_size": batch_size, "steps": steps, "epochs": epochs, "seed": seed}
        return prepare(self, found, collate=collate, options=options, **sizes)

    def clip_grad_norm_(self, max_norm: float) -> None:
        """Clips the step's gradient, when all of it is summed, to this L2 norm; `loader.report.grad_norm` is the norm before.

        Every body of a plain loop calls it, after `backward` and before `optimizer.step()`, with the same `max_norm`.

        Raises:
            TrainerError: in another place, for another norm than before, or one that is not above 0.
        """
        if self.clips is None:
            raise TrainerError("job.clip_grad_norm_() is for plain loops: call job.prepare before, or give the Trainer clip_norm=")
        self.clips(max_norm)

    def weighted(self, loss: Any, weight: Any) -> Any:
        """Returns `loss * weight`, for `backward`: the mean over `weight` tokens (or samples) then counts that many times in its step.

        The step's loss and gradient are the sums over its micro-batches, divided once by the sum of their weights: so with the number of
        tokens as weight they are means over all tokens of the step, however samples of different lengths fall into micro-batches. Every
        body of a plain loop calls it, before `backward`, or none does. A body with several losses gives each the same weight.

        Args:
            loss: the mean loss of this micro-batch, a scalar tensor; it may be NaN if the weight is 0.
            weight: a finite number, or tensor of one, not below 0.

        Raises:
            TrainerError: in another place, or for another weight.
        """
        if self.weighs is None:
            raise TrainerError("job.weighted() is for plain loops: call job.prepare before, or let the Trainer's loss return (sum, weight)")
        return self.weighs(loss, weight)

    def announce(self, ready: dict[str, Any]) -> View | None:
        """Announces that this worker is ready to be a member, and returns the first view; None if it joins a running job.

        `ready` is JSON: address, fingerprint, model, digest, profile (`[forward_s, backward_s, parameters, activation_bytes]` per layer
        and micro-batch, or None where this worker did not measure), micro_batches, grains, settings, and the checkpoint to begin from, if
        there is one. All but address and profile must be equal on all workers, else the job ends with MismatchError.
        """
        self.trains = True
        self.pulse()
        self.send({"type": "announce", "ready": ready})
        with self._ordered:
            self._await_order()
            first = self._orders[0]["type"] == "view"
        if not first:
            return None
        view = View.from_json(self.take_order()["view"])
        self.switch(view)
        return view

    def listen_on(self, waits: Waits) -> None:
        """Makes `quiesce` orders interrupt these waits."""
        self._waits = waits

    def take_order(self) -> dict[str, Any]:
        """Waits for the agent's next order: `quiesce`, `propose` or `view`. Orders that a later `quiesce` makes obsolete are dropped."""
        with self._ordered:
            self._await_order()
            quiesce = [i for i, order in enumerate(self._orders) if order["type"] == "quiesce"]
            latest = quiesce[-1] if quiesce else 0
            self._orders = [order for i, order in enumerate(self._orders) if i >= latest or order["type"] == "view"]
            order = self._orders.pop(0)
            if self._waits is not None and not any(later["type"] == "quiesce" for later in self._orders):
                self._waits.resume()
            return {name: unpacked(value) for name, value in order.items()}

    def _await_order(self) -> None:
        self.waits(AGENT)
        self._ordered.wait_for(lambda: self._orders)
        self.waits(None)

    def _map(self, order: dict[str, Any]) -> None:
        """Maps the segments that came with an order. A worker's number is never reused, so a known one is the same."""
        for worker, fd in zip(order.get(MAPPED, ()), order.pop("fds", ()), strict=True):
            if worker in self.segments:
                os.close(fd)
            else:
                self.segments[worker] = MappedSegment(fd)

    def switch(self, view: View) -> None:
        """Makes this worker a member of a committed view."""
        self.view, self.epoch = view, view.epoch
        for worker in self.segments.keys() - set(view.workers):
            self.segments.pop(worker).close()
        self.pause_requested = False

    def enter(self, phase: str, step: int, micro_batch: int = -1) -> None:
        """Publishes the worker's present phase in its activity record."""
        self._activity.enter(phase, step, self.epoch, micro_batch)
        if self.trace is not None:
            self.trace.phase(phase, step, self.epoch, micro_batch)
        if self.phase_delay is not None:
            self.phase_delay(phase, step)

    def _waits_traced(self, peer: int | None) -> None:
        self._activity.waits(peer)
        if self.trace is not None and threading.get_ident() == self._thread:
            self.trace.waits(peer)

    def at(self, place: str) -> str:
        """Publishes that the training thread is now in the code of `place`, one of `activity.PLACES`; returns the place before."""
        return self._activity.at(place)

    def during(self, place: str, call: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Returns what `call` returns. Publishes meanwhile that this worker is in the code of `place`, one of `activity.PLACES`."""
        before = self._activity.at(place)
        try:
            return call(*arguments, **options)
        finally:
            self._activity.at(before)

    def loading(self, load: Callable[P, T]) -> Callable[P, T]:
        """Returns `load`, which loads a micro-batch, as code of the data loader."""
        return partial(self.during, LOADER, load)

    def progress(
        self,
        epoch: int,
        step: int,
        step_s: float | None = None,
        committed_at: float | None = None,
        told: Callable[[], dict[str, Any]] | None = None,
        *,
        always: bool = False,
    ) -> None:
        """Notes that `step` has begun, for error messages and the agent, which is told only so often unless `always` is set.

        `step_s` is the median of recent steps' seconds, `committed_at` the monotonic time at which the previous step was committed.
        `told` returns further fields, and is called only when a message is sent: `effort` has the fields of
        `elastic.engine.layer_times.EffortReport`, `links` has `[peer, latency_s, bytes_per_s]` of links with new measurements.
        """
        self.epoch, self.step = epoch, step
        now = time.monotonic()
        if always or now - self._told_at >= _PROGRESS_EVERY_S:
            self._told_at = now
            times = {"step_s": step_s, "committed_at": committed_at}
            self.send({"type": "progress", "epoch": epoch, "step": step, **times, **({} if told is None else told())})

    def raised(self, error: BaseException) -> None:
        """Notes that the training ended with `error`, which is raised in `train_fn`. If `train_fn` swallows it, the agent gets it later.

        Otherwise the other workers would wait for this one for ever.
        """
        self._unheard = error
        threading.Thread(target=self._await_hearing, args=(error,), name="elastic-unheard", daemon=True).start()

    def heard(self) -> None:
        """Notes that the last error was handled, or that the training continued."""
        self._unheard = None

    def _await_hearing(self, error: BaseException) -> None:
        time.sleep(UNHEARD_S)
        if self._unheard is error:
            self.give_up(error)

    @property
    def leader(self) -> bool:
        """Whether this worker's return value is the job's: true for the member at place 0, or the first worker if there is no view."""
        return self._first if self.view is None else self.worker == self.view.coordinator

    @property
    def stands_in(self) -> bool:
        """Whether this worker's return value is the job's if the leader is lost in the end: the first member of each host's, and the next
        one after the leader."""
        members = () if self.view is None else self.view.members
        hosts = {member.host: member.worker for member in reversed(members)}
        return self.worker in {*hosts.values(), *(member.worker for member in members[1:2])}

    def deliver(self, message: dict[str, Any]) -> None:
        """Takes a message of the agent, which may be a mere ping; called by the thread that receives them."""
        self.pulse()
        if message["type"] in _ORDERS:
            with self._ordered:
                self._map(message)
                if message["type"] == "quiesce" and self._waits is not None:
                    self._waits.interrupt(Interrupted("the members of the job change"))
                self._orders.append(message)
                self._ordered.notify()
        elif message["type"] == "prepare":
            if self.segment is not None:
                threading.Thread(target=self.segment.prepare, args=(message["bytes"],), name="elastic-memory", daemon=True).start()
        elif message["type"] == "boundary":
            self.pause_requested = True
        elif message["type"] == "stop":
            self.stop_requested = True
        elif message["type"] == "leave":
            self.dismissed.set()


def enter(job: Job) -> None:
    """Makes `job` the current job of this process."""
    global _current
    _current = job


def current_job() -> Job:
    """Returns the job that this process is a worker of: what `train_fn` gets. Raises NotInJob in any other process."""
    if _current is None:
        raise NotInJob(
            "this process is not a worker of a running job: call it inside the train_fn that elastic.run starts, or in a script that "
            "`elastic run script.py` starts"
        )
    return _current


def inside() -> bool:
    """Returns whether this process is a worker."""
    return _current is not None
