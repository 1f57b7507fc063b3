"""An agent's record of one worker, and the messages about a worker's end."""

from __future__ import annotations

import signal
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from elastic import errors
from elastic.control.outcome import failed
from elastic.errors import CheckpointError, JobFailed, SettingsError
from elastic.host.channel import AGENT_GONE, Message

_CONSEQUENCES = frozenset({"PeerLost", "LinkError", "Interrupted"})
_MACHINE = frozenset({"MemoryError", "OutOfMemoryError", "AcceleratorError"})
_FAULTS = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGTRAP, signal.SIGSYS})
_NO_MEMORY = "can't allocate memory"  # torch's CPU allocator raises RuntimeError


@dataclass(slots=True, kw_only=True)
class WorkerProcess:
    """One worker process, on any host. `gone`: its end is known. `status`: an exit code or minus a signal, from its parent."""

    number: int
    slot: int = 0  # the lowest number that no other live worker of this host has: which device it gets
    pid: int | None = None
    pidfd: int = -1
    announced: dict[str, Any] | None = None
    epoch: int = 0
    step: int | None = None
    result: Message | None = None
    error: Message | None = None
    gone: bool = False
    status: int | None = None
    unreaped: bool = False  # gone, and its parent does not report its status
    condemned: str = ""  # why the agent ends it
    failure: str = ""  # what it ran out of, in one line
    host: str = ""  # its host, in a job of several
    lost: str = ""  # which host is lost, and why

    def kill(self, why: str = "the job ends") -> None:
        """Sends SIGKILL, which works on a stopped process too."""
        if self.status is None:
            self.condemned = self.condemned or why
        if self.pidfd >= 0 and not self.gone and self.status is None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    @property
    def finished(self) -> bool:
        return self.result is not None

    @property
    def ended(self) -> bool:
        return self.gone and (self.status is not None or self.unreaped)


def worker_error(worker: WorkerProcess, report: Message) -> Message:
    """Returns the outcome for a worker's exception. Errors of arguments and checkpoints keep their class, others become JobFailed."""
    known = getattr(errors, report["kind"], None) if report["ours"] else None
    kind = known if known is not None and issubclass(known, SettingsError | CheckpointError) else JobFailed
    if not report["traceback"]:
        return failed(kind, report["message"])
    place = _place(report["epoch"], report["step"])
    return failed(kind, f"worker {worker.number} failed{place}\n\n{report['traceback'].rstrip()}")


def is_consequence(kind: str) -> bool:
    """Whether a worker's error of this class is only a consequence of another worker's failure."""
    return kind in _CONSEQUENCES


def is_machine_failure(report: Message) -> bool:
    """Whether the cause of a worker's exception is its machine, such as a lack of memory, and not `train_fn`."""
    return report["kind"] in _MACHINE or (report["kind"] == "RuntimeError" and _NO_MEMORY in report["message"])


def last_line(report: Message) -> str:
    """Returns a worker's exception in one line."""
    lines = (report["traceback"] or report["message"]).strip().splitlines() or [report["kind"]]
    return lines[-1]


def own_doing(worker: WorkerProcess) -> bool:
    """Whether its process ended by its own action: a fault or an exit. Signals such as SIGKILL may come from outside."""
    if worker.condemned or worker.status is None or worker.status == AGENT_GONE:
        return False
    return worker.status >= 0 or -worker.status in _FAULTS


def ran_out_of_memory(worker: WorkerProcess) -> bool:
    """Whether its process ended since it, or its device, had no memory left."""
    return own_doing(worker) and any(said in worker.failure for said in ("OutOfMemoryError", "MemoryError", _NO_MEMORY))


def own_fault(worker: WorkerProcess) -> bool:
    """Whether its process ended by a fault of its own, and may have written anywhere in its memory before."""
    return worker.status is not None and -worker.status in _FAULTS


def how_ended(worker: WorkerProcess) -> str:
    """Describes in one line how and where a worker's process ended."""
    status, place = worker.status or 0, _place(worker.epoch, worker.step)
    known = f"process {worker.pid}" if worker.pid is not None else ""
    process = " on ".join(each for each in (known, "" if worker.lost else worker.host) if each)
    who = f"worker {worker.number} ({process})" if process else f"worker {worker.number}"
    if worker.lost:
        return f"{who} was lost{place} with its host {worker.lost}"
    if worker.failure:
        how = f"failed with {worker.failure}"
    elif worker.condemned:
        how = "was ended"
    elif worker.unreaped:
        how = "ended for an unknown reason, since the fork server does not answer"
    else:
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with code {status} inside train_fn"
    return f"{who} {how}{place}"


def ended(worker: WorkerProcess, why: str = "") -> Message:
    """Returns the outcome when a worker's process ended without a message; `why`, after `how_ended`, is why the job ends."""
    return failed(JobFailed, " ".join(part for part in (how_ended(worker), why) if part))


def returned_early(returned: list[int], waiting: list[int]) -> Message:
    """Returns the outcome when some workers wait for others that have returned."""
    return failed(JobFailed, f"train_fn returned on workers {returned} before making a Trainer, and workers {waiting} wait for them")


def _place(epoch: int, step: int | None) -> str:
    return "" if step is None else f" in epoch {epoch}, step {step}"
