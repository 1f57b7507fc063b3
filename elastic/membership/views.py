"""The committed view in etcd: one key, changed only by compare-and-swap. It identifies the view by its digest: a view has no size limit.

view    {epoch, attempt, digest}
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from elastic.errors import Conflict, Deposed, ElasticError, EtcdUnavailable
from elastic.membership.etcd import Compare, KeyValue
from elastic.view import View

_REMEMBERED = 8  # views whose marks a watch may still deliver


class KeyStore(Protocol):
    """The part of an etcd client that the view needs."""

    def get(self, key: str) -> KeyValue | None: ...
    def transaction(
        self, demands: Sequence[Compare], puts: Mapping[str, str], *, lease: int | None = None, deletes: Iterable[str] = ()
    ) -> int: ...
    def watch_prefix(self, prefix: str, callback: Callable[[KeyValue], None], failed: Callable[[ElasticError], None]) -> None: ...


def digest(data: Any) -> str:
    """Returns the SHA-256 of a JSON value, which stands for a value that is too large for etcd."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def mark(view: View) -> str:
    """Returns the key's value for the committed view `view`."""
    return json.dumps({"epoch": view.epoch, "attempt": view.attempt, "digest": digest(view.to_json())})


def number(text: str | None) -> tuple[int, int] | None:
    """Returns epoch and attempt of a mark, None if the text is no mark."""
    with suppress(ValueError, TypeError, KeyError):
        data = json.loads(text or "")
        epoch, attempt = data["epoch"], data["attempt"]
        if type(epoch) is int and type(attempt) is int and isinstance(data["digest"], str):
            return epoch, attempt
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """The mark that etcd has lost, and how its key was found."""

    found: Compare
    text: str


class ViewStore:
    """The views of one job, whose keys are under `prefix`. `lease` returns the lease of the keys."""

    def __init__(self, store: KeyStore, prefix: str, lease: Callable[[], int | None] = lambda: None) -> None:
        self._store = store
        self._lease = lease
        self.key = f"{prefix}view"
        self._lock = threading.Lock()  # a commit and the watch that sees it run in two threads
        self._committed: str | None = None  # the mark of the newest view that this agent has seen committed
        self._seen: str | None = None  # the newest mark that this agent has seen at etcd, perhaps of a view that it does not know
        self._views: dict[str, View] = {}
        self._unanswered = False  # whether a try to publish the first view got no answer

    def publish(self, view: View, demands: Sequence[Compare] = ()) -> None:
        """Commits `view` as the first one of the job, if `demands` are met.

        Raises Conflict if there is another, EtcdUnavailable if etcd does not answer: then it may be committed; a repeated call finds out.
        """
        text = self.propose(view)
        try:
            self._store.transaction([Compare(key=self.key, mod_revision=0), *demands], {self.key: text}, lease=self._lease())
        except EtcdUnavailable:
            self._unanswered = True  # the write may have succeeded and only its answer been lost
            if not self.holds(text):
                raise
        except Conflict:
            if not self._unanswered or not self.holds(text):
                raise
        self.committed(text)

    def propose(self, view: View) -> str:
        """Stores a proposed view and returns its mark, by which the watch finds it."""
        text = next((text for text, known in self._views.items() if known is view), None) or mark(view)
        self._views[text] = view
        while len(self._views) > _REMEMBERED:
            del self._views[next(iter(self._views))]
        return text

    def current(self) -> str | None:
        """Returns the mark at etcd, None if there is none."""
        entry = self._store.get(self.key)
        text = None if entry is None else entry.value
        self._see(text)
        return text

    @property
    def newest(self) -> str | None:
        """The newest mark that this agent has seen at etcd, which may have lost it since; None if it has seen none."""
        return self._seen

    def _see(self, text: str | None) -> None:
        with self._lock:
            if number(text) is not None and (number(self._seen) or ()) < (number(text) or ()):
                self._seen = text

    def holds(self, text: str) -> bool:
        """Whether etcd has this mark."""
        entry = self._store.get(self.key)
        return entry is not None and entry.value == text

    def demand(self, before: View) -> Compare:
        """Returns the demand of a transaction that `before` is the committed view."""
        return Compare(key=self.key, value=self.propose(before))

    def unchanged(self) -> list[Compare]:
        """Returns the demand of a transaction that the committed view is the newest that this agent has seen, if it has seen one."""
        return [] if self._committed is None else [Compare(key=self.key, value=self._committed)]

    def committed(self, text: str) -> None:
        """Records that the view of this mark was committed, unless a newer one is recorded."""
        with self._lock:
            if self._committed is None or (number(self._committed) or ()) < (number(text) or ()):
                self._committed = text

    def knows(self, text: str) -> bool:
        """Whether this agent has recorded the view of this mark as the committed one; etcd may have lost it since."""
        return text == self._committed

    @property
    def known(self) -> bool:
        """Whether this agent has seen a committed view, or its mark."""
        return self._committed is not None or self._seen is not None

    def missing(self) -> Missing | None:
        """Returns what to write if etcd has lost the mark of the committed view, or has an older mark or no valid one; else None.

        Raises Conflict if etcd has a newer mark that this agent has not proposed.
        """
        committed = self._committed
        if committed is None:
            return None
        entry = self._store.get(self.key)
        there, known = number(None if entry is None else entry.value), number(committed)
        if there is not None and known is not None and there >= known:
            if entry is not None and entry.value != committed and entry.value not in self._views:
                raise Deposed(f"another agent coordinates the job: etcd has the view of epoch {there[0]}, which this one has not proposed")
            return None
        return Missing(found=Compare(key=self.key, mod_revision=entry.mod_revision if entry else 0), text=committed)

    def watch(
        self,
        callback: Callable[[View], None],
        strange: Callable[[str], None] = lambda _: None,
        failed: Callable[[ElasticError], None] = lambda _: None,
    ) -> None:
        """Calls back, from a thread, with every committed view that this agent has proposed; `strange` gets a sentence about any other
        value of the key."""

        def changed(entry: KeyValue) -> None:
            if entry.key != self.key or entry.value is None:
                return
            self._see(entry.value)
            view = self._views.get(entry.value)
            if view is not None:
                # Workers will train in it. If the answer to the commit and etcd's data are lost, this is the only record of it.
                self.committed(entry.value)
                callback(view)
            elif entry.value != self._committed:
                strange(f"another client has overwritten the etcd key {self.key} with {entry.value[:60]!r}")

        self._store.watch_prefix(self.key, changed, failed)
