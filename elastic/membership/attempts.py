"""The attempts at the next view, as etcd keeps them: the number last burned, one proposal and one key of votes per host for each.

    attempt                          "<epoch>.<attempt>"
    proposals/<epoch>.<attempt>      the proposal, once
    votes/<epoch>.<attempt>/<host>   {worker: reason of its refusal or null}

All calls raise EtcdUnavailable, may then be repeated, and mean the same when they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from elastic.errors import Conflict
from elastic.membership.election import Election
from elastic.membership.etcd import Compare, Entry
from elastic.membership.views import ViewStore, job_prefix
from elastic.view import View

Era = tuple[int, int]


class AttemptStore(Protocol):
    """What attempts need of an etcd client."""

    def get(self, key: str) -> Entry | None: ...
    def get_prefix(self, prefix: str) -> list[Entry]: ...
    def put(self, key: str, value: str, *, lease: int | None = None) -> None: ...
    def put_if_absent(self, key: str, value: str, *, lease: int | None = None) -> int: ...
    def transaction(self, demands: Sequence[Compare], puts: Mapping[str, str], *, lease: int | None = None) -> int: ...
    def delete_prefix(self, prefix: str) -> None: ...


class Attempts:
    """One agent's part in the attempts of a job."""

    def __init__(self, store: AttemptStore, job: str, host: str, election: Election, views: ViewStore) -> None:
        self._store = store
        self._host = host
        self._election = election
        self._views = views
        self._prefix = job_prefix(job)
        self._key = f"{self._prefix}attempt"
        self._begun: Era | None = None
        self._demands: tuple[Compare, ...] = ()

    def begin(self, era: Era) -> None:
        """Burns the number. Raises Conflict if another agent coordinates, or this number or a later one was burned by somebody."""
        self._begun = None
        held = self._election.hold()
        last = self._store.get(self._key)
        if last is not None and last.value is not None and _parsed(last.value) > era:
            raise Conflict(f"attempt {last.value} has begun, after {_name(era)}")
        if last is None or last.value != _name(era):
            self._store.transaction([held, Compare(key=self._key, mod_revision=last.mod_revision if last else 0)], {self._key: _name(era)})
        self._begun, self._demands = era, (held, Compare(key=self._key, value=_name(era)))

    def publish(self, era: Era, proposal: Mapping[str, Any]) -> None:
        """Puts the proposal, once. Raises Conflict if there is another."""
        key, text = f"{self._prefix}proposals/{_name(era)}", json.dumps(proposal)
        try:
            self._store.put_if_absent(key, text)
        except Conflict:
            entry = self._store.get(key)
            if entry is None or entry.value != text:
                raise

    def vote(self, era: Era, votes: Mapping[int, str | None]) -> None:
        """Puts the votes of this host's workers: None, or the reason of a refusal."""
        self._store.put(f"{self._prefix}votes/{_name(era)}/{self._host}", json.dumps(votes))

    def commit(self, era: Era, view: View, expected_mod_revision: int) -> int:
        """Makes `view` the job's, in one transaction; its mod_revision. What it demands: the view it was made from, this attempt, this
        coordinator, and the votes of all members. Raises Conflict if one of these is not so, unless this very view is committed already.
        """
        if self._begun != era:
            raise Conflict(f"attempt {_name(era)} is not the one that this agent has begun")
        text = json.dumps(view.to_json())
        try:
            demands = [Compare(key=self._views.key, mod_revision=expected_mod_revision), *self._demands, *self._votes(era, view)]
            return self._store.transaction(demands, {self._views.key: text})
        except Conflict:
            entry = self._store.get(self._views.key)  # an earlier try may have gone through, with its answer lost
            if entry is None or entry.value != text:
                raise
            return entry.mod_revision

    def sweep(self) -> None:
        """Deletes the proposals and votes of all attempts: for when a view is committed."""
        for kind in ("proposals/", "votes/"):
            self._store.delete_prefix(f"{self._prefix}{kind}")

    def _votes(self, era: Era, view: View) -> list[Compare]:
        """Demands that the votes are as they were read here. Raises Conflict if one is missing or refuses."""
        entries = self._store.get_prefix(f"{self._prefix}votes/{_name(era)}/")
        votes = {int(worker): refusal for entry in entries for worker, refusal in json.loads(entry.value or "{}").items()}
        without = [worker for worker in view.workers if votes.get(worker, "no vote") is not None]
        if without:
            raise Conflict(f"workers {without} have not voted for attempt {_name(era)}")
        return [Compare(key=entry.key, mod_revision=entry.mod_revision) for entry in entries]


def _name(era: Era) -> str:
    return f"{era[0]}.{era[1]}"


def _parsed(name: str) -> Era:
    with suppress(ValueError):
        epoch, attempt = name.split(".")
        return int(epoch), int(attempt)
    return (0, 0)
