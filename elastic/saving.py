"""Saving while training goes on: every worker writes what it owns from a snapshot, in a thread; the coordinator makes it a checkpoint.

    all          due: one round tells all members which states there are, their step counts, and whether everybody's last save is over
                 snapshot of the own shards, then a thread: find or make the save's directory, write, sync, a receipt
    READY        receipts travel with it
    coordinator  when all members' receipts are there, and the view is still the same: commit, in a thread; then what retention says

A save that loses a member, or whose view ends, is given up; its directory is removed, or later collected. No step waits for a disk.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from checkpoint.commit import TEMPORARY, Ticket, abandon, begin, commit, read_latest, retry_name, write_runs
from checkpoint.plan import FilePlan, plan_files
from checkpoint.state import PARAM, Contents, Group, Spec
from checkpoint.store import Store
from checkpoint.writer import PartReceipt
from elastic.errors import CheckpointError
from elastic.restore import Run

_log = logging.getLogger(__name__)
_LOOK_S, _PATIENCE_S = 0.005, 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one member tells the others before a save: dtypes of the states that it owns, numbers by parameter, and whether it is busy.

    `base` is the epoch of the newest checkpoint when its job began, None on a worker that joined later; `hint` that of the newest one now.
    """

    states: Mapping[str, Mapping[str, str]]
    numbers: Mapping[str, Mapping[str, float | int | bool]]
    busy: bool
    base: int | None
    hint: int

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Share:
        return cls(**data)


def base_of(shares: Sequence[Share]) -> int:
    """The epoch that the job's own epochs are counted from, so that those of a later job are greater. All founders may be gone."""
    return min((share.base for share in shares if share.base is not None), default=max(share.hint for share in shares))


def hint(store: Store) -> int:
    """The epoch of the newest checkpoint, as far as the store says; 0 if there is none."""
    found = read_latest(store)
    return 0 if found is None else found[1][1]


def states_of(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """Parameter -> state -> dtype."""
    found: dict[str, dict[str, str]] = {}
    for run in runs:
        found.setdefault(run.name, {})[run.state] = str(run.values.dtype).removeprefix("torch.")
    return found


def contents_of(
    shapes: Mapping[str, tuple[int, ...]],
    shares: Sequence[Share],
    *,
    rest: Mapping[str, Spec],
    groups: Sequence[Group],
    ties: Mapping[str, str],
    buffers: frozenset[str],
    step: int,
    extra: Mapping[str, Any],
) -> Contents:
    """What the checkpoint holds, from what all members told: the same on each of them. `rest` are frozen parameters and buffers."""
    states: dict[str, dict[str, str]] = {}
    numbers: dict[str, Mapping[str, float | int | bool]] = {}
    for share in shares:
        for name, dtypes in share.states.items():
            states.setdefault(name, {}).update(dtypes)
        numbers.update(share.numbers)
    tensors: dict[str, dict[str, Spec]] = {}
    for name, shape in shapes.items():
        ordered = [PARAM, *sorted(state for state in states.get(name, {}) if state != PARAM)]
        tensors[name] = {state: Spec(shape=shape, dtype=states[name][state]) for state in ordered}
    return Contents(
        tensors={**tensors, **{name: {PARAM: spec} for name, spec in rest.items()}},
        scalars={name: numbers[name] for name in shapes if name in numbers},
        groups=tuple(groups),
        ties=ties,
        frozen=frozenset(rest) - buffers,
        buffers=buffers,
        step=step,
        extra=extra,
    )


@dataclass(slots=True, kw_only=True)
class _Save:
    """One save under way. `key` is the same on all members."""

    key: tuple[int, int]
    plan: FilePlan
    members: tuple[int, ...]
    layout: Any
    thread: threading.Thread | None = None
    ticket: Ticket | None = None
    receipt: PartReceipt | None = None
    sent: bool = False
    dropped: bool = False
    receipts: dict[int, PartReceipt] = field(default_factory=dict)


class Saver:
    """One worker's part of all saves, in a store. `retain` is called with the store after each commit."""

    def __init__(self, store: Store, worker: int, *, founder: bool, retain: Any = None) -> None:
        self._store, self._worker, self._retain = store, worker, retain
        self.base = hint(store) if founder else None
        self._save: _Save | None = None
        self._committing: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether the last save is under way here: being written, waiting for receipts, or being committed."""
        return self._save is not None or (self._committing is not None and self._committing.is_alive())

    def start(
        self, contents: Contents, runs: Sequence[Run], *, epoch: int, base: int, members: tuple[int, ...], coordinates: bool, layout: Any
    ) -> None:
        """Takes a snapshot of the runs, and writes it from a thread. All members call it, for the same step of the same view."""
        self.drop()
        assert contents.step is not None
        snapshot = [(run.name, run.state, run.start, run.values.clone()) for run in runs]
        plan = plan_files(contents)
        save = _Save(key=(contents.step, base + epoch), plan=plan, members=members, layout=layout)
        save.thread = threading.Thread(target=self._write, args=(save, snapshot, coordinates), name="elastic-save", daemon=True)
        self._save = save
        save.thread.start()

    def _write(self, save: _Save, snapshot: list[tuple[str, str, int, torch.Tensor]], coordinates: bool) -> None:
        step, epoch = save.key
        try:
            save.ticket = begin(self._store, save.plan, step=step, epoch=epoch) if coordinates else self._find(save)
            save.receipt = write_runs(save.plan, self._store, save.ticket, snapshot, threads=1)
        except CheckpointError as error:
            _log.warning("step %d is not saved: %s", step, error)
        if save.dropped:
            self._abandon(save)

    def _find(self, save: _Save) -> Ticket:
        """The directory that the coordinator makes."""
        step, epoch = save.key
        prefix = f"{TEMPORARY if self._store.renames else ''}{retry_name(step, epoch, 0)}-"
        until = time.monotonic() + _PATIENCE_S
        while time.monotonic() < until:
            for name in self._store.names(""):
                token = name.removeprefix(prefix)
                if token != name and self._complete(name, save.plan):
                    return Ticket(step=step, epoch=epoch, attempt=0, token=token, directory=name, fingerprint=save.plan.fingerprint)
            time.sleep(_LOOK_S)
        raise CheckpointError(
            f"{self._store.where(prefix)}...: the coordinator's directory did not appear in {_PATIENCE_S:g} s: "
            "checkpoints need a directory that all hosts share"
        )

    def _complete(self, name: str, plan: FilePlan) -> bool:
        """The coordinator makes the files one after the other."""
        return all(self._store.size(f"{name}/{file.name}") == file.size for file in plan.files)

    def receipt(self) -> dict[str, Any] | None:
        """What goes with this worker's next READY when its writing is over: its receipt, once; that is None if writing failed."""
        save = self._save
        if save is None or save.sent or (save.thread is not None and save.thread.is_alive()):
            return None
        save.sent = True
        if self._worker != save.members[0]:
            self._save = None
        return {"key": list(save.key), "receipt": None if save.receipt is None else save.receipt.to_json()}

    def take(self, told: Mapping[int, Mapping[str, Any]], members: tuple[int, ...]) -> None:
        """Receipts of members of the present view, of which the coordinator takes note: it commits when all are there."""
        save = self._save
        if save is None or save.members != members or self._worker != members[0]:
            return
        for worker, each in told.items():
            if tuple(each["key"]) == save.key and each["receipt"] is None:
                self.drop(f"worker {worker} could not write its part")
                return
            if tuple(each["key"]) == save.key:
                save.receipts[worker] = PartReceipt.from_json(each["receipt"])
        if set(save.receipts) == set(members) and save.ticket is not None:
            self._save = None
            self._committing = threading.Thread(target=self._commit, args=(save, save.ticket), name="elastic-commit", daemon=True)
            self._committing.start()

    def _commit(self, save: _Save, ticket: Ticket) -> None:
        try:
            name = commit(self._store, save.plan, ticket, [save.receipts[worker] for worker in save.members], layout=save.layout)
            _log.info("step %d is saved: %s", save.key[0], self._store.where(name))
            if self._retain is not None:
                self._retain(self._store)
        except CheckpointError as error:
            _log.warning("step %d is not saved: %s", save.key[0], error)
            abandon(self._store, save.plan, ticket)

    def wait(self) -> None:
        """Returns when this worker's writing is over."""
        if self._save is not None and self._save.thread is not None:
            self._save.thread.join()

    def finish(self) -> None:
        """Returns when everything that was begun is over."""
        self.wait()
        if self._committing is not None:
            self._committing.join()

    def drop(self, why: str = "the members changed") -> None:
        """Gives up a save that is not committed."""
        save, self._save = self._save, None
        if save is None:
            return
        if self._worker == save.members[0]:
            _log.warning("step %d is not saved: %s", save.key[0], why)
        save.dropped = True
        if save.thread is None or not save.thread.is_alive():  # else it does this itself
            self._abandon(save)

    def _abandon(self, save: _Save) -> None:
        if save.ticket is not None and self._worker == save.members[0]:
            abandon(self._store, save.plan, save.ticket)
