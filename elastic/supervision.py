"""What an agent knows of one worker, and how the end of a worker reads to the user."""

from __future__ import annotations

import signal
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from elastic import errors
from elastic.channel import Channel, Message
from elastic.errors import JobFailed, SettingsError

_CONSEQUENCES = frozenset({"PeerLost", "LinkError", "Interrupted"})


@dataclass(slots=True, kw_only=True)
class Worker:
    """One worker process. `gone` is what its pidfd says, `status` what its parent reaped: an exit code, or minus a signal."""

    number: int
    channel: Channel
    pid: int | None = None
    pidfd: int = -1
    announced: dict[str, Any] | None = None
    epoch: int = 0
    step: int | None = None
    result: Message | None = None
    error: Message | None = None
    gone: bool = False
    status: int | None = None

    def kill(self) -> None:
        """SIGKILL, which works on a stopped process too."""
        if self.pidfd >= 0 and self.status is None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    @property
    def finished(self) -> bool:
        return self.result is not None


def failed(kind: type[errors.ElasticError], message: str) -> Message:
    """The outcome of a job that ends with an error."""
    return {"type": "failed", "kind": kind.__name__, "message": message}


def worker_error(worker: Worker, report: Message) -> Message:
    """The outcome for an exception that a worker reported. Wrong arguments keep their class, all else is JobFailed."""
    known = getattr(errors, report["kind"], None) if report["ours"] else None
    kind = known if known is not None and issubclass(known, SettingsError) else JobFailed
    if not report["traceback"]:
        return failed(kind, report["message"])
    place = _place(report["epoch"], report["step"])
    return failed(kind, f"worker {worker.number} failed{place}\n\n{report['traceback'].rstrip()}")


def is_consequence(kind: str) -> bool:
    """Whether a worker's error of this class only says that something happened to another worker."""
    return kind in _CONSEQUENCES


def ended(worker: Worker) -> Message:
    """The outcome when a worker's process ended without a word."""
    status = worker.status or 0
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with code {status} inside train_fn"
    hint = "; the system may be out of memory" if status == -signal.SIGKILL else ""
    return failed(JobFailed, f"worker {worker.number} (process {worker.pid}) {how}{_place(worker.epoch, worker.step)}{hint}")


def returned_early(returned: list[int], waiting: list[int]) -> Message:
    """The outcome when some workers wait for others that will never join them."""
    return failed(JobFailed, f"train_fn returned on workers {returned} before making a Trainer, and workers {waiting} wait for them")


def _place(epoch: int, step: int | None) -> str:
    return "" if step is None else f" in epoch {epoch}, step {step}"
