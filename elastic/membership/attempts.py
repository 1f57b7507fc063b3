"""The attempts at the next view in etcd: the number last burned; for each attempt a proposal and one key of votes per agent.

    attempt                           "<epoch>.<attempt>"
    proposals/<epoch>.<attempt>       the proposal's digest, once; the proposal itself goes over the agent's own connections
    votes/<epoch>.<attempt>/<agent>   {worker: reason of its refusal or null}

All calls raise EtcdUnavailable and may then be repeated: they are idempotent. If etcd has lost what this agent wrote (it came back empty, a
lease ran out, or another client deleted or overwrote it), `begin` and `commit` write it again, unless another incarnation has the name or
another agent coordinates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from elastic.comm.message import AttemptId
from elastic.errors import Conflict, Deposed
from elastic.membership.claim import Claim
from elastic.membership.election import Election
from elastic.membership.etcd import Compare, KeyValue
from elastic.membership.views import Missing, ViewStore, digest
from elastic.view import View

_REASON_LETTERS = 200


class AttemptStore(Protocol):
    """The part of an etcd client that attempts need."""

    def get(self, key: str) -> KeyValue | None: ...
    def get_prefix(self, prefix: str) -> list[KeyValue]: ...
    def put(self, key: str, value: str, *, lease: int | None = None) -> None: ...
    def put_if_absent(self, key: str, value: str, *, lease: int | None = None) -> int: ...
    def transaction(
        self, demands: Sequence[Compare], puts: Mapping[str, str], *, lease: int | None = None, deletes: Iterable[str] = ()
    ) -> int: ...
    def delete_prefix(self, prefix: str) -> None: ...


class Attempts:
    """One agent's part in the attempts of a job.

    `lease` returns the lease of the keys; `reclaim` takes the job's name again if etcd has lost it.
    """

    def __init__(
        self,
        store: AttemptStore,
        claim: Claim,
        agent: str,
        election: Election,
        views: ViewStore,
        lease: Callable[[], int | None] = lambda: None,
        reclaim: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._claim = claim
        self._agent = agent
        self._election = election
        self._views = views
        self._lease = lease
        self._reclaim = reclaim
        self._prefix = claim.prefix
        self._key = f"{self._prefix}attempt"
        self._started: AttemptId | None = None
        self._demands: tuple[Compare, ...] = ()
        self._voted: tuple[AttemptId, str] | None = None

    def begin(self, attempt_id: AttemptId) -> None:
        """Burns the attempt's number.

        Raises Conflict if another agent coordinates or a later number was burned, and NameLost.
        """
        self._started = None
        try:
            self._burn(attempt_id)
        except Deposed:
            raise
        except Conflict:  # also if the lease's thread has just restored a lost key
            self.restore()
            self._burn(attempt_id)

    def publish_first(self, view: View) -> None:
        """Commits the first view, for which `begin` was called. Raises Conflict, NameLost."""
        try:
            self._views.publish(view, self._demands)
        except Conflict:
            self._renew((view.epoch, view.attempt))
            self._views.publish(view, self._demands)

    def ask(self) -> None:
        """Returns if etcd answers."""
        self._store.get(self._key)

    def publish(self, attempt_id: AttemptId, proposal: Mapping[str, Any]) -> None:
        """Writes the digest of the proposal, once. Raises Conflict if there is another."""
        key, text = f"{self._prefix}proposals/{_name(attempt_id)}", digest(proposal)
        try:
            self._store.put_if_absent(key, text, lease=self._lease())
        except Conflict:
            entry = self._store.get(key)
            if entry is None or entry.value != text:
                raise

    def vote(self, attempt_id: AttemptId, votes: Mapping[int, str | None]) -> None:
        """Writes the votes of this agent's workers: None, or the reason of a refusal."""
        short = {worker: reason and reason[:_REASON_LETTERS] for worker, reason in votes.items()}
        self._voted = attempt_id, json.dumps(short, separators=(",", ":"))
        self._put_votes()

    def commit(self, attempt_id: AttemptId, view: View, before: View) -> None:
        """Commits `view` in one transaction. It demands that `before` is the committed view, that this incarnation has the name, this
        attempt is current, this agent coordinates, and all members have voted for it. Raises Conflict if a demand fails, unless this view
        is committed already, or etcd had only lost keys that no other client has written since. Raises NameLost.
        """
        if self._started != attempt_id:
            raise Conflict(f"attempt {_name(attempt_id)} is not the one that this agent has started")
        text = self._views.propose(view)
        try:
            self._swap(attempt_id, view, before)
        except Conflict:
            # An earlier try may have succeeded and its answer been lost. If etcd has lost the view too, the watch may have seen it.
            if not self._views.knows(text) and not self._views.holds(text):
                self._renew(attempt_id)
                self._swap(attempt_id, view, before)
        self._views.committed(text)

    def burned(self) -> AttemptId | None:
        """Returns the attempt that was burned last, by any agent; None if there is none."""
        last = self._store.get(self._key)
        return None if last is None else _parsed(last.value)

    def sweep(self) -> None:
        """Deletes the proposals and votes of all attempts, once a view is committed."""
        for kind in ("proposals/", "votes/"):
            self._store.delete_prefix(f"{self._prefix}{kind}")

    def restore(self) -> bool:
        """Writes the claim and the view again if etcd has lost them. Returns whether it had.

        Raises NameLost if another incarnation has the name, and Conflict if etcd has a view that this agent has not proposed, or another
        agent coordinates.
        """
        entry = self._store.get(self._claim.key)
        gone = entry is None or entry.value != self._claim.held.value
        if gone:
            self._reclaim()
        lost = self._views.missing()
        if lost is not None:
            try:
                self._restore(lost)
            except Conflict:  # the lease's thread restores too
                lost = self._views.missing()
                if lost is not None:
                    self._restore(lost)
                return True
        return gone or lost is not None

    def _restore(self, lost: Missing) -> None:
        held = self._election.hold()  # another agent may have been elected, which writes the view that it knows
        self._store.transaction([self._claim.held, held, lost.found], {self._views.key: lost.text}, lease=self._lease())

    def _swap(self, attempt_id: AttemptId, view: View, before: View) -> None:
        demands = [self._views.demand(before), *self._demands, *self._votes(attempt_id, view)]
        self._store.transaction(demands, {self._views.key: self._views.propose(view)}, lease=self._lease())

    def _renew(self, attempt_id: AttemptId) -> None:
        """Writes the keys of a started attempt again if etcd has lost them. Raises what `begin` raises."""
        self.restore()
        self._burn(attempt_id)
        if self._voted is not None and self._voted[0] == attempt_id:
            self._put_votes()

    def _put_votes(self) -> None:
        assert self._voted is not None  # both callers ensure it
        attempt_id, text = self._voted
        self._store.put(f"{self._prefix}votes/{_name(attempt_id)}/{self._agent}", text, lease=self._lease())

    def _burn(self, attempt_id: AttemptId) -> None:
        held = self._election.hold()
        last = self._store.get(self._key)
        burned = None if last is None else _parsed(last.value)
        if last is not None and burned is not None and burned > attempt_id:
            raise Conflict(f"attempt {last.value} has started, after {_name(attempt_id)}")
        if last is None or last.value != _name(attempt_id):
            attempt = Compare(key=self._key, mod_revision=last.mod_revision if last else 0)
            demands = [self._claim.held, held, attempt, *self._views.unchanged()]
            self._store.transaction(demands, {self._key: _name(attempt_id)}, lease=self._lease())
        self._started, self._demands = attempt_id, (self._claim.held, held, Compare(key=self._key, value=_name(attempt_id)))

    def _votes(self, attempt_id: AttemptId, view: View) -> list[Compare]:
        """Returns demands that the votes have not changed since they were read here. Raises Conflict if one is missing or refuses."""
        entries = self._store.get_prefix(f"{self._prefix}votes/{_name(attempt_id)}/")
        votes: dict[int, str | None] = {}
        for entry in entries:
            with suppress(ValueError, AttributeError):  # a value that no agent of this job wrote is no vote
                votes.update({int(worker): refusal for worker, refusal in json.loads(entry.value or "{}").items()})
        without = [worker for worker in view.workers if votes.get(worker, "no vote") is not None]
        if without:
            raise Conflict(f"workers {without} have not voted for attempt {_name(attempt_id)}")
        return [Compare(key=entry.key, mod_revision=entry.mod_revision) for entry in entries]


def _name(attempt_id: AttemptId) -> str:
    return f"{attempt_id[0]}.{attempt_id[1]}"


def _parsed(name: str | None) -> AttemptId | None:
    """Returns epoch and attempt of a name, None if it is no attempt."""
    with suppress(ValueError, AttributeError):
        epoch, attempt = (name or "").split(".")
        return int(epoch), int(attempt)
    return None
