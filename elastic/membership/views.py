"""The committed view in etcd: one key, changed only by compare-and-swap. It holds which view that is, not the view: those have no bound.

view    {epoch, attempt, digest}
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from elastic.errors import Conflict, ElasticError, EtcdUnavailable
from elastic.membership.etcd import Compare, KeyValue
from elastic.view import View

_REMEMBERED = 8  # views whose marks a watch may still tell of


class KeyStore(Protocol):
    """What the view needs of an etcd client."""

    def get(self, key: str) -> KeyValue | None: ...
    def compare_and_put(self, key: str, value: str, expected_mod_revision: int, *, lease: int | None = None) -> int: ...
    def watch_prefix(self, prefix: str, callback: Callable[[KeyValue], None], failed: Callable[[ElasticError], None]) -> None: ...


def digest(data: Any) -> str:
    """Of JSON values: what stands in etcd for what is too large for it."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def mark(view: View) -> str:
    """The value of the key when `view` is the committed one."""
    return json.dumps({"epoch": view.epoch, "attempt": view.attempt, "digest": digest(view.to_json())})


def number(text: str | None) -> tuple[int, int] | None:
    """Epoch and attempt of a mark; None where it is none."""
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
    """The views of one job, whose keys lie under `prefix`. `lease` gives the one that they hang on."""

    def __init__(self, store: KeyStore, prefix: str, lease: Callable[[], int | None] = lambda: None) -> None:
        self._store = store
        self._lease = lease
        self.key = f"{prefix}view"
        self._lock = threading.Lock()  # a commit and the watch that sees it are two threads
        self._committed: str | None = None  # the mark of the newest view that this agent knows to be committed
        self._views: dict[str, View] = {}
        self._unanswered = False  # a try to publish the first one

    def publish(self, view: View) -> None:
        """Makes `view` the first one of the job.

        Raises Conflict if there is another, EtcdUnavailable if etcd is away: then it may be published, and repeating this finds out.
        """
        text = self.propose(view)
        try:
            self._store.compare_and_put(self.key, text, 0, lease=self._lease())
        except EtcdUnavailable:
            self._unanswered = True  # the answer was lost, maybe not the write
            if not self.holds(text):
                raise
        except Conflict:
            if not self._unanswered or not self.holds(text):
                raise
        self.committed(text)

    def propose(self, view: View) -> str:
        """Its mark, under which a watch will find it."""
        text = next((text for text, known in self._views.items() if known is view), None) or mark(view)
        self._views[text] = view
        while len(self._views) > _REMEMBERED:
            del self._views[next(iter(self._views))]
        return text

    def holds(self, text: str) -> bool:
        """Whether etcd has this mark."""
        entry = self._store.get(self.key)
        return entry is not None and entry.value == text

    def demand(self, before: View) -> Compare:
        """What a transaction demands so that it counts only while `before` is the committed view."""
        return Compare(key=self.key, value=self.propose(before))

    def unchanged(self) -> list[Compare]:
        """What a transaction demands so that it counts only while the committed view is the one that this agent knows, if it knows one."""
        return [] if self._committed is None else [Compare(key=self.key, value=self._committed)]

    def committed(self, text: str) -> None:
        """The view of this mark was committed; it is the committed one unless a newer one is known."""
        with self._lock:
            if self._committed is None or (number(self._committed) or ()) < (number(text) or ()):
                self._committed = text

    def knows(self, text: str) -> bool:
        """Whether this agent knows the view of this mark to be the committed one; etcd may have lost it since."""
        return text == self._committed

    def missing(self) -> Missing | None:
        """What to write where etcd has lost the mark of the committed view, has an older one, or something that is no mark.

        Raises Conflict if it has a newer one that this agent has not proposed.
        """
        committed = self._committed
        if committed is None:
            return None
        entry = self._store.get(self.key)
        there, known = number(None if entry is None else entry.value), number(committed)
        if there is not None and known is not None and there >= known:
            if entry is not None and entry.value != committed and entry.value not in self._views:
                raise Conflict(f"{self.key} names epoch {there[0]}, attempt {there[1]}, which this agent has not proposed")
            return None
        return Missing(found=Compare(key=self.key, mod_revision=entry.mod_revision if entry else 0), text=committed)

    def watch(
        self,
        callback: Callable[[View], None],
        strange: Callable[[str], None] = lambda _: None,
        failed: Callable[[ElasticError], None] = lambda _: None,
    ) -> None:
        """Calls back, from a thread, with every committed view that this agent has proposed; `strange` gets a sentence about what else is
        written there."""

        def changed(entry: KeyValue) -> None:
            if entry.key != self.key or entry.value is None:
                return
            view = self._views.get(entry.value)
            if view is not None:
                # Workers will train in it. If the answer to the commit, and then etcd's data, are lost, nobody else knows.
                self.committed(entry.value)
                callback(view)
            elif entry.value != self._committed:
                strange(f"{self.key} was overwritten by somebody with {entry.value[:60]!r}")

        self._store.watch_prefix(self.key, changed, failed)
