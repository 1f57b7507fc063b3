"""Saving while training goes on: every member writes what it owns in a thread; the coordinator makes it a checkpoint.

    all          start: the same contents, each with its own runs and numbers; a thread makes the directory or waits for it, writes, syncs
    all          receipt: once its writing is over; the caller brings it to the coordinator
    coordinator  take: when all members' receipts are there, and the members are still the same: commit, in a thread; then `retain`

A save that loses a member is given up; its directory is removed by the coordinator, or by the first member that is left, or is later
collected. No step waits for a disk, nor for the plan of a save's files, and at most one save is under way: whoever is `busy` leaves out the
next one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from elastic.checkpoint.commit import (
    TOKEN,
    Ticket,
    abandon,
    begin,
    commit,
    join,
    read_latest,
    take_over,
    ticket_of,
    token_bytes,
    write_runs,
)
from elastic.checkpoint.plan import FilePlan, plan_files
from elastic.checkpoint.state import Contents
from elastic.checkpoint.store import Store
from elastic.checkpoint.writer import PartReceipt, TensorRun
from elastic.errors import CheckpointError

_log = logging.getLogger(__name__)
_PATIENCE_S = 20.0
_RARER, _RAREST = 8, 20

Prepare = Callable[[], tuple[Contents, Sequence[TensorRun]]]
"""What the checkpoint holds, and what of it this member writes; of `scalars`, those that this member knows."""


def newest_epoch(store: Store) -> int:
    """The epoch of the newest checkpoint, as far as the store says; 0 if there is none."""
    found = read_latest(store)
    return 0 if found is None else found[1][1]


@dataclass(slots=True, kw_only=True)
class _Save:
    """One save under way. `key`, which is step and epoch, and `token` are the same on all members."""

    key: tuple[int, int]
    token: str
    members: tuple[int, ...]
    layout: Any
    release: Callable[[], None]
    thread: threading.Thread | None = None
    plan: FilePlan | None = None
    ticket: Ticket | None = None
    receipt: PartReceipt | None = None
    sent: bool = False
    over: bool = False
    dropped: bool = False
    told: bool = False
    left: tuple[int, ...] = ()
    lock: threading.Lock = field(default_factory=threading.Lock)
    receipts: dict[int, PartReceipt] = field(default_factory=dict)


class Backoff:
    """A wait for what others make, with looks that get rarer: an eighth of the time so far lies between them, at least `look_s` and at
    most 20 times that."""

    def __init__(self, look_s: float, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep) -> None:
        self._look_s, self._clock, self._sleep = look_s, clock, sleep
        self._began = clock()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return self._clock() - self._began

    def pause(self) -> None:
        """Until the next look."""
        self._sleep(min(max(self._look_s, self.seconds / _RARER), _RAREST * self._look_s))


class Saver:
    """One worker's part of all saves, in a store. `retain` is called with the store after each commit.

    `allowed` is asked by the coordinator before a save begins and before it is committed; it raises CheckpointError if this job may not
    save there. `tell(step, None)` says that this coordinator has saved a step, `tell(step, reason)` that it could not.
    """

    def __init__(
        self,
        store: Store,
        worker: int,
        *,
        retain: Callable[[Store], None] | None = None,
        allowed: Callable[[Store], None] = lambda store: None,
        tell: Callable[[int, str | None], None] = lambda step, reason: None,
    ) -> None:
        self._store, self._worker, self._retain, self._allowed, self._tell = store, worker, retain, allowed, tell
        self._save: _Save | None = None
        self._told: _Save | None = None  # whose receipt is with the coordinator
        self._ending: threading.Thread | None = None  # commits the last save, or removes what is left of it
        self.saved: int | None = None
        """The newest step whose save this worker committed."""

    @property
    def busy(self) -> bool:
        """Whether the last save is under way here: being written, waiting for receipts, being committed or removed."""
        return self._save is not None or (self._ending is not None and self._ending.is_alive())

    def start(
        self,
        prepare: Prepare,
        *,
        step: int,
        epoch: int,
        token: str,
        members: tuple[int, ...],
        layout: Any = None,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepares and writes in a thread; the runs' memory must stay as it is until the thread calls `release`.

        All members call it, for the same step of the same view, with the same new `token`; the first of `members` coordinates.
        """
        self.drop()
        save = _Save(key=(step, epoch), token=token, members=members, layout=layout, release=release)
        go = threading.Event()
        save.thread = threading.Thread(target=self._write, args=(save, prepare, go), name="checkpoint-save", daemon=True)
        self._save = save
        save.thread.start()
        go.set()

    def _write(self, save: _Save, prepare: Prepare, go: threading.Event) -> None:
        go.wait()  # a new thread would keep the interpreter for its first 5 ms, and `start` would wait for it
        step, epoch = save.key
        try:
            contents, runs = prepare()
            plan = save.plan = plan_files(contents)
            if self._coordinates(save):
                self._allowed(self._store)
                save.ticket = begin(self._store, plan, step=step, epoch=epoch, token=save.token)
            else:
                save.ticket = ticket_of(self._store, plan, step=step, epoch=epoch, token=save.token)
                self._await(save, plan, save.ticket)
            receipt = write_runs(plan, self._store, save.ticket, runs, threads=1)
            self._join(save, plan, save.ticket)
            save.receipt = replace(receipt, scalars=contents.scalars)
        except CheckpointError as error:
            self._failed(save, str(error))
        except Exception as error:  # the thread's boundary, such as no memory: training goes on, and so may the next save
            _log.exception("the state after %d steps is not saved", step)
            self._tell_failed(save, f"{type(error).__name__}: {error}")
        finally:
            save.release()
        with save.lock:
            save.over, dropped = True, save.dropped
        if dropped and self._removes(save):
            self._remove(save)

    def _failed(self, save: _Save, reason: str) -> None:
        _log.warning("the state after %d steps is not saved: %s", save.key[0], reason)
        self._tell_failed(save, reason)

    def _tell_failed(self, save: _Save, reason: str) -> None:
        if self._coordinates(save) and not save.told:
            save.told = True
            self._tell(save.key[0], reason)

    def _coordinates(self, save: _Save) -> bool:
        return self._worker == save.members[0]

    def _await(self, save: _Save, plan: FilePlan, ticket: Ticket) -> None:
        """The directory that the coordinator makes."""
        waiting = Backoff(self._store.look_s)
        for name, size in self._made(plan, ticket):  # one that is there is not looked at again
            while self._store.size(f"{ticket.directory}/{name}") != size:
                if save.dropped:
                    raise CheckpointError("it was given up")
                if waiting.seconds > _PATIENCE_S:
                    raise CheckpointError(
                        f"{self._store.where(ticket.directory)}: the coordinator's directory did not appear in {_PATIENCE_S:g} s: "
                        "checkpoints need a directory that all hosts share"
                    )
                waiting.pause()

    def _made(self, plan: FilePlan, ticket: Ticket) -> list[tuple[str, int]]:
        """Names and sizes of what the coordinator makes: the token, or the files one after the other where they are not made of parts."""
        if not self._store.shared_writes:  # and a put may be seen half done
            return [(TOKEN, len(token_bytes(ticket.token, (file.name for file in plan.files))))]
        return [(file.name, file.size) for file in plan.files]

    def _join(self, save: _Save, plan: FilePlan, ticket: Ticket) -> None:
        """The files that this member has to make of everybody's parts."""
        place = save.members.index(self._worker)
        waiting = Backoff(self._store.look_s)
        while not join(plan, self._store, ticket, place, len(save.members)):
            waiting.pause()
            there = (self._store.size(f"{ticket.directory}/{name}") == size for name, size in self._made(plan, ticket))
            if save.dropped or not all(there):
                raise CheckpointError("it was given up")

    def receipt(self) -> dict[str, Any] | None:
        """What the coordinator has to get when this worker's writing is over: its receipt, once; that is None if writing failed."""
        save = self._save
        if save is None or save.sent or not save.over:
            return None
        save.sent = True
        if not self._coordinates(save):
            self._save, self._told = None, save
        return {"key": list(save.key), "receipt": None if save.receipt is None else save.receipt.to_json()}

    def take(self, told: Mapping[int, Mapping[str, Any]], members: tuple[int, ...]) -> None:
        """Receipts of members of the present view, of which the coordinator takes note: it commits when all are there."""
        save = self._save
        if save is None or save.members != members or not self._coordinates(save):
            return
        for worker, each in told.items():
            if tuple(each["key"]) == save.key and each["receipt"] is None:
                self.drop(f"worker {worker} could not write its part")
                return
            if tuple(each["key"]) == save.key:
                save.receipts[worker] = PartReceipt.from_json(each["receipt"])
        if set(save.receipts) == set(members) and save.plan is not None and save.ticket is not None:
            self._save = None
            self._end("checkpoint-commit", self._commit, save, save.plan, save.ticket)

    def _end(self, name: str, end: Callable[..., None], *arguments: Any) -> None:
        self._ending = threading.Thread(target=end, args=arguments, name=name, daemon=True)
        self._ending.start()

    def _commit(self, save: _Save, plan: FilePlan, ticket: Ticket) -> None:
        try:
            self._allowed(self._store)
            name = commit(self._store, plan, ticket, [save.receipts[worker] for worker in save.members], layout=save.layout)
            self.saved = save.key[0]
            _log.info("the state after %d steps is saved: %s", save.key[0], self._store.where(name))
            self._tell(save.key[0], None)
        except CheckpointError as error:
            self._failed(save, str(error))
            abandon(self._store, plan, ticket)
            return
        try:
            if self._retain is not None:
                self._retain(self._store)
        except CheckpointError as error:
            _log.warning("the state after %d steps is saved, but older checkpoints were not removed: %s", save.key[0], error)

    def wait(self, seconds: float | None = None) -> bool:
        """Returns when this worker's writing is over, or the time: whether it is over."""
        thread = None if self._save is None else self._save.thread
        if thread is None:
            return True
        thread.join(seconds)
        return not thread.is_alive()

    def finish(self) -> None:
        """Returns when everything that was begun is over."""
        self.wait()
        if self._ending is not None:
            self._ending.join()

    def drop(self, why: str = "the members changed", left: tuple[int, ...] | None = None) -> None:
        """Gives up a save that is not committed. `left` are the members that there are now, by default all."""
        save, self._save, self._told = self._save or self._told, None, None
        if save is None:
            return
        if self._coordinates(save):
            self._failed(save, why)
        save.left = save.members if left is None else tuple(worker for worker in save.members if worker in left)
        with save.lock:
            save.dropped, over = True, save.over
        if over and self._removes(save):  # else the thread does this itself
            self._end("checkpoint-remove", self._remove, save)

    def _removes(self, save: _Save) -> bool:
        """Whoever of the members comes first does it for all."""
        return save.left[:1] == (self._worker,)

    def _remove(self, save: _Save) -> None:
        if save.plan is not None and save.ticket is not None:
            (abandon if self._coordinates(save) else take_over)(self._store, save.plan, save.ticket)
