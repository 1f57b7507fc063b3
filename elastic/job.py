"""A worker's view of its job: what `train_fn` receives, and the conversation with the agent behind it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from elastic.errors import NotInJob
from elastic.settings import JobSettings
from elastic.view import View

Send = Callable[[dict[str, Any]], None]

_PROGRESS_EVERY_S = 0.25
_current: Job | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What the agent tells a new worker. `import_path` and `argv` are the launcher's, so that imports work as they do there."""

    worker: int
    host: str
    directory: str
    secret: str  # hexadecimal
    settings: JobSettings
    import_path: tuple[str, ...] = ()
    argv: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "worker": self.worker,
            "host": self.host,
            "directory": self.directory,
            "secret": self.secret,
            "settings": self.settings.to_json(),
            "import_path": self.import_path,
            "argv": self.argv,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> WorkerSpec:
        lists = {name: tuple(data[name]) for name in ("import_path", "argv")}
        return cls(**{**data, **lists, "settings": JobSettings.from_json(data["settings"])})


class Job:
    """The running job, seen from one of its workers.

    `worker` is this process's id, `workers` how many were asked for, `host` names the machine, `secret` authenticates links, `directory`
    is private to the job and removed at its end. `profile` tells that this worker is the one that measures what layers cost.
    """

    def __init__(self, spec: WorkerSpec, send: Send) -> None:
        self.settings = spec.settings
        self.name = spec.settings.name
        self.worker = spec.worker
        self.workers = spec.settings.workers
        self.host = spec.host
        self.directory = spec.directory
        self.secret = bytes.fromhex(spec.secret)
        self.exact = spec.settings.exact
        self.profile = spec.worker == 0
        self.stop_requested = False  # the user pressed Ctrl-C once: stop at the next step boundary
        self.dismissed = threading.Event()  # every worker has finished: this one may exit
        self.view: View | None = None
        self.epoch = 0
        self.step: int | None = None
        self._send = send
        self._views: queue.SimpleQueue[View] = queue.SimpleQueue()
        self._told_at = 0.0

    def announce(self, ready: dict[str, Any]) -> View:
        """Says that this worker is ready to be a member, and waits for the first view.

        `ready` is JSON: address, fingerprint, model, digest, profile (`[forward_s, backward_s, parameters, activation_bytes]` per layer
        and micro-batch, or None where this worker did not measure), micro_batches, grains, settings. All but address and profile must be
        equal on all workers, else the job ends with MismatchError.
        """
        self._send({"type": "announce", "ready": ready})
        self.view = self._views.get()
        self.epoch = self.view.epoch
        return self.view

    def progress(self, epoch: int, step: int) -> None:
        """Notes that `step` has begun, for error messages and the agent. Cheap enough for every step."""
        self.epoch, self.step = epoch, step
        now = time.monotonic()
        if now - self._told_at >= _PROGRESS_EVERY_S:
            self._told_at = now
            self._send({"type": "progress", "epoch": epoch, "step": step})

    @property
    def leader(self) -> bool:
        """Whether this worker's return value is the job's: the member at place 0, or worker 0 if no view was ever needed."""
        return self.worker == (0 if self.view is None else self.view.coordinator)

    def deliver(self, message: dict[str, Any]) -> None:
        """Takes a message of the agent; called by the thread that listens to it."""
        if message["type"] == "view":
            self._views.put(View.from_json(message["view"]))
        elif message["type"] == "stop":
            self.stop_requested = True
        elif message["type"] == "leave":
            self.dismissed.set()


def enter(job: Job) -> None:
    """Makes `job` the one of this process."""
    global _current
    _current = job


def current() -> Job:
    """The job that this process is a worker of. Raises NotInJob elsewhere."""
    if _current is None:
        raise NotInJob("this process is not a worker of a running job: call it inside the train_fn that elastic.run starts")
    return _current


def inside() -> bool:
    """Whether this process is a worker."""
    return _current is not None
