"""The train function of the jobs of the harness: it calls the user's, and writes down what that is given, from inside the worker.

Nothing of this changes what is trained, but for three things: the loop is ended after a step that the harness names while the job runs; the
digest of all parameters is taken behind it; and what is saved is saved in a folder of the harness, by a trainer that saves nothing too, if
the harness wants saves. So a run neither goes on from checkpoints of the user's, nor replaces them.

Each worker appends JSON lines to a file of its own, one write a line, so that a killed worker leaves all that it wrote:

    {"is": "start", worker, pid, run, at, exact, batch_size, micro_batch_size, seed, every, samples}
    {"is": "load", step, micro_batch, samples}              a micro-batch was loaded, of these samples (null: the data has no indices)
    {"is": "step", at, and the fields of elastic.Report}     the loop was given a step
    {"is": "digest", step, digest}                           on the leader
    {"is": "returned", step}

`run` is the same for all workers of one incarnation of the job: another one begins when a job that ended is started again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import elastic
from elastic.script import sources, target
from elastic.worker import trainer as trainers
from elastic.worker.trainer import Trainer

STOP = "stop"
"""The file with the number of steps after which all workers end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What the harness wants of the workers: `folder` for their files, the user's function with `args`, the directory for checkpoints, the
    steps between saves (None: as the trainer itself saves), and, for an undisturbed run, the steps between digests."""

    folder: str
    script: str
    checkpoint: str
    args: tuple[Any, ...] = ()
    every: int | None = None
    digest_every: int = 0

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Orders:
        """The inverse of `to_json`."""
        return cls(**{**data, "args": tuple(data["args"])})


class Notes:
    """The file of this worker."""

    def __init__(self, folder: str, job: elastic.Job) -> None:
        self.path = Path(folder) / f"{job.worker}-{os.getpid()}.jsonl"
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.worker = job.worker
        self.run = hashlib.sha256(b"a run of the job" + job.secret).hexdigest()[:12]

    def add(self, what: str, **values: Any) -> None:
        """Appends a line; a full disk of the job is no reason to end it."""
        os.write(self._file, (json.dumps({"is": what, **values}) + "\n").encode())


class _Recorded:
    """A data set that writes down the indices that are asked for."""

    def __init__(self, data: Any, taken: list[int]) -> None:
        self._data, self._taken = data, taken

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Any:
        self._taken.append(index)
        return self._data[index]


def train(job: elastic.Job, orders: dict[str, Any]) -> Any:
    """Calls the user's train function, and returns what it returns; the parameters' digest is among the notes."""
    given = Orders.from_json(orders)
    notes, made = Notes(given.folder, job), list[Trainer]()
    _watch(given, notes, made)
    function = target.load(given.script)
    sources.note_imported()
    value = function(*target.call_arguments(function, job, given.args))
    if made:
        _note_digest(notes, made[0])
        notes.add("returned", step=made[0].step)
    return value


def _note_digest(notes: Notes, trainer: Trainer) -> None:
    digest = trainer.digest()
    if trainer.leader:
        notes.add("digest", step=trainer.step, digest=digest)


def _watch(orders: Orders, notes: Notes, made: list[Trainer]) -> None:
    """Makes the trainer of this process write notes."""
    begin, take, load = Trainer.__init__, Trainer.run, trainers.batches

    def init(self: Trainer, model: Any, loss: Any, optimizer: Any, data: Any, **options: Any) -> None:
        options.update(_saves(options, orders))
        indexed = hasattr(data, "__getitem__") and hasattr(data, "__len__")
        about = {name: options.get(name) for name in ("batch_size", "micro_batch_size", "seed", "every")}
        about["samples"] = len(data) if indexed else None
        notes.add(
            "start", worker=notes.worker, pid=os.getpid(), run=notes.run, at=time.monotonic(), exact=options.get("exact", True), **about
        )
        made.append(self)
        begin(self, model, loss, optimizer, data, **options)

    def run(self: Trainer, steps: int) -> Iterator[elastic.Report]:
        return _reported(take(self, steps), self, orders, notes)

    Trainer.__init__ = init
    Trainer.run = run
    trainers.batches = lambda data, **options: _loading(load, data, options, notes)


def _saves(options: Mapping[str, Any], orders: Orders) -> dict[str, Any]:
    """The options of a trainer that say where and how often it saves."""
    if options.get("checkpoint") is None and orders.every is None:
        return {}
    return {"checkpoint": orders.checkpoint, "every": options.get("every") if orders.every is None else orders.every, "keep": 3}


def _loading(load: Callable[..., Any], data: Any, options: dict[str, Any], notes: Notes) -> Callable[[int, int], Any]:
    """Returns the function that loads a micro-batch, and writes down which samples that takes."""
    indexed, taken = hasattr(data, "__getitem__") and hasattr(data, "__len__"), list[int]()
    inner = load(_Recorded(data, taken) if indexed else data, **options)

    def batch(step: int, micro_batch: int) -> Any:
        taken.clear()
        value = inner(step, micro_batch)
        notes.add("load", step=step, micro_batch=micro_batch, samples=[*taken] if indexed else None)
        return value

    return batch


def _reported(loop: Iterator[elastic.Report], trainer: Trainer, orders: Orders, notes: Notes) -> Iterator[elastic.Report]:
    """Passes on the reports of a loop and writes them down, until the step that the harness names."""
    stop = Path(orders.folder) / STOP
    if trainer.step >= _limit(stop):
        return
    for report in loop:
        notes.add("step", at=time.monotonic(), **dataclasses.asdict(report))
        yield report
        if orders.digest_every and trainer.step % orders.digest_every == 0:
            _note_digest(notes, trainer)
        if report.step + 1 >= _limit(stop):
            return


def _limit(stop: Path) -> float:
    try:
        return int(stop.read_text())
    except (FileNotFoundError, ValueError):
        return float("inf")
