"""Saves while training goes on: every member writes what it owns in a thread; the coordinator commits the checkpoint.

    all          start: the same contents, each with its own runs and scalars; a thread makes the directory or waits for it, writes, syncs
    all          receipt: returned once, when writing is over; the caller sends it to the coordinator
    coordinator  take: when all receipts have arrived, and the members are still the same: commits in a thread, then calls `retain`

A save that loses a member is given up; the coordinator or the first remaining member removes its directory, or `collect` does later. No
step waits for a disk, nor for the plan of a save's files. At most one save is under way: a member that is `busy` leaves out the next one.
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
"""Returns the checkpoint's contents (of `scalars`, those that this member has), and the runs that this member writes."""


def newest_epoch(store: Store) -> int:
    """Returns the epoch of the newest checkpoint by the store's hint; 0 if there is none."""
    found = read_latest(store)
    return 0 if found is None else found[1][1]


@dataclass(slots=True, kw_only=True)
class _Save:
    """One save under way. `key` (step and epoch) and `token` are the same on all members."""

    key: tuple[int, int]
    token: str
    members: tuple[int, ...]
    layout: Any
    release: Callable[[], None]
    verify: Callable[[], None] = lambda: None
    thread: threading.Thread | None = None
    plan: FilePlan | None = None
    ticket: Ticket | None = None
    receipt: PartReceipt | None = None
    sent: bool = False
    over: bool = False
    dropped: bool = False
    reported: bool = False
    left: tuple[int, ...] = ()
    lock: threading.Lock = field(default_factory=threading.Lock)
    receipts: dict[int, PartReceipt] = field(default_factory=dict)


class Backoff:
    """A wait for other members' files, polled less and less often: a pause is an eighth of the time so far, at least `look_s` and at
    most 20 times that."""

    def __init__(self, look_s: float, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep) -> None:
        self._look_s, self._clock, self._sleep = look_s, clock, sleep
        self._began = clock()

    @property
    def seconds(self) -> float:
        """Seconds since the wait began."""
        return self._clock() - self._began

    def pause(self) -> None:
        """Sleeps until the next poll."""
        self._sleep(min(max(self._look_s, self.seconds / _RARER), _RAREST * self._look_s))


class Saver:
    """One worker's part of all saves in a store. `retain` is called with the store after each commit.

    The coordinator calls `allowed` before a save begins and before it is committed; it raises CheckpointError if this job may not
    save there. The coordinator reports a saved step by `tell(step, None)`, a failed one by `tell(step, reason)`.
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
        self._sent: _Save | None = None  # its receipt was sent to the coordinator
        self._ending: threading.Thread | None = None  # commits the last save, or removes what is left of it
        self.saved: int | None = None
        """The newest step whose save this worker committed."""

    @property
    def busy(self) -> bool:
        """Whether this worker still writes the last save, waits for its receipts, commits it or removes it."""
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
        verify: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts a save in a thread. The runs' memory must not change until the thread calls `release`.

        `verify` is called when it is written, and raises CheckpointError if the memory has changed.

        All members call it for the same step of the same view, with the same new `token`; the first of `members` coordinates.
        """
        self.drop()
        save = _Save(key=(step, epoch), token=token, members=members, layout=layout, release=release, verify=verify)
        go = threading.Event()
        save.thread = threading.Thread(target=self._write, args=(save, prepare, go), name="checkpoint-save", daemon=True)
        self._save = save
        save.thread.start()
        go.set()

    def _write(self, save: _Save, prepare: Prepare, go: threading.Event) -> None:
        go.wait()  # a new thread would hold the interpreter lock for its first 5 ms, and `start` would wait for it
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
            save.verify()
            save.receipt = replace(receipt, scalars=contents.scalars)
        except CheckpointError as error:
            self._failed(save, str(error))
        except Exception as error:  # the thread's boundary (out of memory, for example): training goes on, and the next save may succeed
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
        if self._coordinates(save) and not save.reported:
            save.reported = True
            self._tell(save.key[0], reason)

    def _coordinates(self, save: _Save) -> bool:
        return self._worker == save.members[0]

    def _await(self, save: _Save, plan: FilePlan, ticket: Ticket) -> None:
        """Waits for the directory that the coordinator makes."""
        waiting = Backoff(self._store.look_s)
        for name, size in self._made(plan, ticket):  # a file that exists is not checked again
            while self._store.size(f"{ticket.directory}/{name}") != size:
                if save.dropped:
                    raise CheckpointError("the save was given up")
                if waiting.seconds > _PATIENCE_S and ticket.directory not in self._store.names(""):  # else the storage is slow
                    raise CheckpointError(
                        f"{self._store.where(ticket.directory)}: the coordinator's directory did not appear in {_PATIENCE_S:g} s: "
                        "checkpoints need a directory that all hosts share"
                    )
                waiting.pause()

    def _made(self, plan: FilePlan, ticket: Ticket) -> list[tuple[str, int]]:
        """Returns names and sizes of the files that the coordinator makes: only the token where files are joined from parts."""
        if not self._store.shared_writes:  # with shared writes, a put may be seen half done
            return [(TOKEN, len(token_bytes(ticket.token, (file.name for file in plan.files))))]
        return [(file.name, file.size) for file in plan.files]

    def _join(self, save: _Save, plan: FilePlan, ticket: Ticket) -> None:
        """Joins the files of this member from all members' parts; waits for missing parts."""
        place = save.members.index(self._worker)
        waiting = Backoff(self._store.look_s)
        while not join(plan, self._store, ticket, place, len(save.members)):
            waiting.pause()
            there = (self._store.size(f"{ticket.directory}/{name}") == size for name, size in self._made(plan, ticket))
            if save.dropped or not all(there):
                raise CheckpointError("the save was given up")

    def receipt(self) -> dict[str, Any] | None:
        """Returns the message to the coordinator, once, when this worker's writing is over; its `receipt` is None if writing failed."""
        save = self._save
        if save is None or save.sent or not save.over:
            return None
        save.sent = True
        if not self._coordinates(save):
            self._save, self._sent = None, save
        return {"key": list(save.key), "receipt": None if save.receipt is None else save.receipt.to_json()}

    def take(self, reports: Mapping[int, Mapping[str, Any]], members: tuple[int, ...]) -> None:
        """Collects receipts of members of the present view on the coordinator, and commits when all have arrived."""
        save = self._save
        if save is None or save.members != members or not self._coordinates(save):
            return
        for worker, each in reports.items():
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
        """Waits at most `seconds` until this worker's writing is over, and returns whether it is."""
        thread = None if self._save is None else self._save.thread
        if thread is None:
            return True
        thread.join(seconds)
        return not thread.is_alive()

    def finish(self) -> None:
        """Waits until writing, and the commit or removal that was started, are over."""
        self.wait()
        if self._ending is not None:
            self._ending.join()

    def drop(self, why: str = "the members changed", left: tuple[int, ...] | None = None) -> None:
        """Gives up a save that is not committed. `left` are the remaining members, by default all."""
        save, self._save, self._sent = self._save or self._sent, None, None
        if save is None:
            return
        if self._coordinates(save):
            self._failed(save, why)
        save.left = save.members if left is None else tuple(worker for worker in save.members if worker in left)
        with save.lock:
            save.dropped, over = True, save.over
        if over and self._removes(save):  # else the writing thread removes it
            self._end("checkpoint-remove", self._remove, save)

    def _removes(self, save: _Save) -> bool:
        """Returns whether this worker removes the directory: the first remaining member does it."""
        return save.left[:1] == (self._worker,)

    def _remove(self, save: _Save) -> None:
        if save.plan is not None and save.ticket is not None:
            (abandon if self._coordinates(save) else take_over)(self._store, save.plan, save.ticket)
