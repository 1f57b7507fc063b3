"""A job's name at etcd, and the incarnation of the job that has it.

    /elastic/<name>/incarnation     {incarnation, host, process, settings}, with the agent's lease
    /elastic/<name>/<incarnation>/  everything else of that job

The name is taken in one transaction that demands that the key does not exist. An agent whose lease ran out (it, its host, the network or
etcd stood still) takes the name again if it is free. If another incarnation has it and trains, this job ends; one that has no view yet is
the later one, and yields to a job that has. No job deletes or overwrites other keys of another incarnation.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

from elastic.errors import Conflict, EtcdUnavailable, NameLost, NameTaken
from elastic.membership.etcd import ROOT, Compare, KeyValue


class ClaimStore(Protocol):
    """The part of an etcd client that a claim needs."""

    def get(self, key: str) -> KeyValue | None: ...
    def refresh(self, lease: int) -> bool: ...
    def put_if_absent(self, key: str, value: str, *, lease: int | None = None) -> int: ...
    def transaction(
        self, demands: Sequence[Compare], puts: Mapping[str, str], *, lease: int | None = None, deletes: Iterable[str] = ()
    ) -> int: ...


class Claim:
    """The claim of one incarnation (a random text) on a name. `settings` is a digest of the job's settings, for information only.

    `shared`: agents of other hosts may join the incarnation.
    """

    def __init__(self, store: ClaimStore, name: str, incarnation: str, settings: str = "", *, shared: bool = False) -> None:
        self._store = store
        self._name = name
        self.key = f"{ROOT}{name}/incarnation"
        self.prefix = f"{ROOT}{name}/{incarnation}/"
        self.incarnation = incarnation
        value = {"incarnation": incarnation, "host": socket.gethostname(), "process": os.getpid(), "settings": settings}
        self._value = json.dumps({**value, "shared": True} if shared else value)
        self._lease: int | None = None

    @property
    def held(self) -> Compare:
        """The demand of a transaction that this incarnation has the name."""
        return Compare(key=self.key, value=self._value)

    def take(self, lease: int) -> None:
        """Takes the name. Raises NameTaken if a job has it, EtcdUnavailable."""
        try:
            self._store.put_if_absent(self.key, self._value, lease=lease)
        except Conflict as error:
            entry = self._store.get(self.key)
            if self._ours(entry):  # by a try whose answer was lost
                self.retake(lease)
                return
            where = "" if entry is None else f" ({_described(entry.value)})"
            raise NameTaken(f"name={self._name!r}: a job of this name runs{where}; choose another") from error

    def take_or_join(self, lease: int) -> bool:
        """Takes the name, or joins the incarnation that has it. Returns whether it was taken.

        Raises NameTaken if a job has it that other agents cannot join, EtcdUnavailable.
        """
        try:
            self._store.put_if_absent(self.key, self._value, lease=lease)
        except Conflict as error:
            entry = self._store.get(self.key)
            if entry is None or entry.value is None:
                raise EtcdUnavailable(f"{self.key} changed while it was read") from error
            incarnation = _incarnation(entry.value)
            if incarnation == self.incarnation:  # by a try whose answer was lost
                self.retake(lease)
                return True
            if incarnation is None or not json.loads(entry.value).get("shared"):
                raise NameTaken(
                    f"name={self._name!r}: a job of this name runs that other hosts cannot join ({_described(entry.value)}); choose another"
                ) from error
            self._value, self.incarnation, self._lease = entry.value, incarnation, entry.lease or None
            self.prefix = f"{ROOT}{self._name}/{incarnation}/"
            return False
        self._lease = lease
        return True

    def join(self) -> None:
        """Joins this incarnation again, which may have lost the name. Raises NameLost if another one has it and trains, EtcdUnavailable."""
        entry = self._store.get(self.key)
        if not self._ours(entry) and entry is not None and self._trains(entry.value):
            why = f"and another job has its name ({_described(entry.value)})"
            raise NameLost(f"the job {self._name!r} has ended while this host was cut off from it, {why}")

    def keep(self) -> bool:
        """Renews the lease of the name's key, which another agent may have granted: the name is taken as long as any agent lives.

        Returns whether this incarnation has the name. Raises EtcdUnavailable.
        """
        entry = self._store.get(self.key)
        return self._ours(entry) and entry is not None and self._store.refresh(entry.lease)

    @property
    def leases(self) -> tuple[int, ...]:
        """The lease of the name's key, where it is known."""
        return () if self._lease is None else (self._lease,)

    def _trains(self, value: str | None) -> bool:
        """Whether the incarnation of a claim has a view. Raises EtcdUnavailable."""
        incarnation = _incarnation(value)
        return incarnation is not None and self._store.get(self._view(incarnation)) is not None

    def _view(self, incarnation: str) -> str:
        return f"{ROOT}{self._name}/{incarnation}/view"

    def _ours(self, entry: KeyValue | None) -> bool:
        """Whether this incarnation has the name. Another agent of it may have written it, so its text is taken over."""
        ours = entry is not None and _incarnation(entry.value) == self.incarnation
        if ours and entry is not None and entry.value is not None:
            self._value, self._lease = entry.value, entry.lease or None
        return ours

    def retake(self, lease: int, *, trains: bool = False) -> None:
        """Makes sure that this incarnation has the name, under this lease.

        Raises NameLost if another one has it, unless that one has no view yet and this one `trains`; and EtcdUnavailable.
        """
        entry = self._store.get(self.key)
        demands = [Compare(key=self.key, mod_revision=0 if entry is None else entry.mod_revision)]
        other = None if entry is None or self._ours(entry) else _incarnation(entry.value)
        if other is not None and entry is not None:
            if not trains or self._trains(entry.value):
                raise NameLost(
                    f"this job's lease at etcd ran out, and another job has taken its name {self._name!r} since "
                    f"({_described(entry.value)}): this job ends, so that only one has the name; the other job's keys were not touched"
                )
            demands.append(Compare(key=self._view(other), mod_revision=0))
        try:
            self._store.transaction(demands, {self.key: self._value}, lease=lease)
        except Conflict as error:
            raise EtcdUnavailable(f"{self.key} changed while it was read") from error
        self._lease = lease

    def give_up(self) -> None:
        """Deletes the claim, together with the job's view, if it is this incarnation's. Raises EtcdUnavailable.

        So who finds the view and not the claim knows that the job has not ended.
        """
        with suppress(Conflict):
            self._store.transaction([self.held], {}, deletes=[self.key, f"{self.prefix}view"])


def incarnation_of(store: ClaimStore, name: str) -> str | None:
    """Returns the prefix of the keys of the job that has this name, None if none has it."""
    entry = store.get(f"{ROOT}{name}/incarnation")
    incarnation = None if entry is None else _incarnation(entry.value)
    return None if incarnation is None else f"{ROOT}{name}/{incarnation}/"


def _incarnation(value: str | None) -> str | None:
    """Returns the incarnation of a claim, None if the value is no claim."""
    with suppress(ValueError, TypeError, KeyError):
        found = json.loads(value or "")["incarnation"]
        return found if isinstance(found, str) else None
    return None


def _described(value: str | None) -> str:
    incarnation = _incarnation(value)
    if value is None or incarnation is None:
        return f"its key holds {(value or '')[:40]!r}, which no job wrote: delete it if none runs"
    found = json.loads(value)
    return f"on host {found.get('host')}, process {found.get('process')}, incarnation {incarnation}"
