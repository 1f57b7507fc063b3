"""Runs one training process, from the fork to the report of how `train_fn` ended.

This module has one connection, to the agent; the trainer makes the links to other workers.

    worker -> agent   announce {ready} | progress {epoch, step} | result {value, valued, stopped, step, told}
                      error {kind, ours, message, traceback, epoch, step} | lasts {threads}
    agent -> worker   view {view} | stop {} | leave {} | ping {}; the end of the connection is the death of the agent, and so of the worker
"""

from __future__ import annotations

import faulthandler
import importlib
import io
import os
import random
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from elastic.errors import CheckpointError, ElasticError, MismatchError, NonFinite, SettingsError
from elastic.host import signals
from elastic.host.channel import AGENT_GONE, Channel, Message
from elastic.host.rundir import RunDirectory
from elastic.memory.segment import OwnSegment
from elastic.memory.tensors import use_segment
from elastic.observe import phase_delay
from elastic.observe.console import CLEARS_LINE
from elastic.observe.output import KeptStream, OutputFile
from elastic.script import sources, target
from elastic.worker import devices
from elastic.worker import job as jobs
from elastic.worker.after_return import NoStepLeft, check_value, is_value, tell_of_lasting_threads
from elastic.worker.called_at import called_at, defined_at
from elastic.worker.job import Job, WorkerSpec
from elastic.worker.refusals import advice


class _AgentLine:
    """The worker's end of its socket to the agent: any thread may send, one thread receives."""

    def __init__(self, socket_fd: int) -> None:
        self._channel = Channel.adopt(socket_fd)
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        with self._lock:
            self._channel.send(message)

    def listen(self, job: Job) -> None:
        threading.Thread(target=self._listen, args=(job,), name="elastic-agent", daemon=True).start()

    def _listen(self, job: Job) -> None:
        try:
            while not self._channel.closed:
                for message in self._channel.receive():
                    job.deliver(message)
        except BaseException as error:  # without memory, say: train_fn would wait for ever for what was not delivered
            self.send(_failure(job, error))
            os._exit(1)
        os._exit(AGENT_GONE)


def main(spec: dict[str, Any], socket_fd: int, segment_fd: int | None = None) -> int:
    """Runs the worker that `spec` (a WorkerSpec as JSON) describes. Returns the process's exit code: 0, or 1 after an error."""
    parsed = WorkerSpec.from_json(spec)
    line = _AgentLine(socket_fd)
    job = Job(parsed, line.send)
    job.segment = None if segment_fd is None else OwnSegment(segment_fd)
    use_segment(job.segment)
    signals.outlive_a_stop(lambda: job.stop_requested)
    kept = _prepare(parsed)
    job.give_up = lambda error: _give_up(line, job, error)
    jobs.enter(job)
    line.listen(job)
    try:
        job.phase_delay = phase_delay.read(parsed.directory)
        target.check_hidden(parsed.modules)
        kind = devices.choose(parsed.settings.device, parsed.slot, parsed.settings.workers_per_device)
        value, valued = _train(job, kind, parsed.slot)
        if job.behind is not None:
            job.behind(value)
        job.heard()
        kept.end()
    except BaseException as error:  # the process boundary: every error is reported to the agent
        job.heard()
        kept.end()
        line.send(_failure(job, error))
        return 1
    line.send({"type": "result", "value": value, "valued": valued, "stopped": job.stop_requested, "step": job.step, "told": job.model})
    # Others may still wait for messages queued on this worker's links, or take their closing for a death.
    job.dismissed.wait(parsed.settings.grace_s)
    tell_of_lasting_threads(lambda names: line.send({"type": "lasts", "threads": names}))
    return 0


def _prepare(spec: WorkerSpec) -> OutputFile:
    if sys.stderr is not None:
        faulthandler.enable()
    kept = OutputFile(RunDirectory(Path(spec.directory)).output, spec.worker)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # else closed, or replaced by a package
            stream.reconfigure(line_buffering=True, write_through=False)
            setattr(sys, name, KeptStream(stream, partial(kept.write, name[3]), CLEARS_LINE if spec.bar and stream.isatty() else ""))
    sys.path[:] = spec.import_path
    sys.argv[:] = spec.argv
    torch.set_num_threads(spec.settings.threads)
    seed = spec.settings.seed
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)
    return kept


def _train(job: Job, kind: str, slot: int) -> tuple[Any, bool]:
    """Runs the train function. Returns its value, and whether it may be the job's."""
    train_fn = target.load(job.settings.train_fn)
    sources.note_imported()
    job.device = devices.begin(kind, slot, job.settings.workers_per_device)
    try:
        value = train_fn(*target.call_arguments(train_fn, job, job.settings.args))
    except (StopIteration, NoStepLeft):  # of `next(iter(loader))`, say
        if not job.stop_requested:
            raise
        value = None
    if job.leader:
        check_value(value, f"train_fn{defined_at(train_fn)}")
    valued = job.leader or (job.stands_in and is_value(value))
    return (value, True) if valued else (None, False)


def _give_up(line: _AgentLine, job: Job, error: BaseException) -> None:
    """Reports an error that `train_fn` has swallowed, and exits; the other workers would wait for ever otherwise."""
    report = _failure(job, error)
    report["traceback"] = "".join(traceback.format_exception(error)) + "\ntrain_fn caught this exception and neither raised it nor returned"
    line.send(report)
    os._exit(1)


def _failure(job: Job, error: BaseException) -> Message:
    message = _text(error)
    if isinstance(error, SystemExit):
        message = f"train_fn called sys.exit({_text(error.code, repr)}), which ends the job as a failure, without saving its last step"
    tb = _user_part(error.__traceback__)
    if tb is not None and isinstance(error, SettingsError | NonFinite | CheckpointError | MismatchError):
        message, tb = message + called_at(tb), None
    text = "" if tb is None else "".join(traceback.format_exception(type(error), error, tb))
    if text and (more := _text(error, advice)):
        text = f"{text.rstrip()}\n\n{message}. {more}" if isinstance(error, SystemExit) else f"{text.rstrip()}\n\n{more}"
    return {
        "type": "error",
        "kind": type(error).__name__,
        "ours": isinstance(error, ElasticError),
        "message": message,
        "traceback": text,  # empty if the runtime refused something: the message is enough
        "epoch": job.epoch,
        "step": job.step,
    }


def _text(value: object, how: Callable[[Any], str] = str) -> str:
    """Returns the text of a user's object; an exception whose `__str__` raises must be reported too."""
    try:
        return how(value)
    except Exception as error:  # a user's class may raise anything
        return f"<a {type(value).__name__} whose text raises {type(error).__name__}>"


def _user_part(tb: TracebackType | None) -> TracebackType | None:
    """Returns the traceback without the leading frames of this module and of the import system."""
    rest = tb
    while rest is not None and _is_plumbing(rest.tb_frame.f_code.co_filename):
        rest = rest.tb_next
    return rest


def _is_plumbing(filename: str) -> bool:
    return filename.startswith("<frozen importlib") or filename in (__file__, devices.__file__, target.__file__, importlib.__file__)
