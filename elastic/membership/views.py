"""The committed view in etcd: one key, changed only by compare-and-swap. It holds which view that is, not the view: those have no bound.

view    {epoch, attempt, digest}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from elastic.errors import Conflict, ElasticError, EtcdUnavailable
from elastic.membership.etcd import Compare, Entry
from elastic.view import View

_REMEMBERED = 8  # views whose marks a watch may still tell of


class KeyStore(Protocol):
    """What the view needs of an etcd client."""

    def get(self, key: str) -> Entry | None: ...
    def compare_and_put(self, key: str, value: str, expected_mod_revision: int, *, lease: int | None = None) -> int: ...
    def watch_prefix(self, prefix: str, callback: Callable[[Entry], None], failed: Callable[[ElasticError], None]) -> None: ...


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


class ViewStore:
    """The views of one job, whose keys lie under `prefix`. `lease` gives the one that they hang on."""

    def __init__(self, store: KeyStore, prefix: str, lease: Callable[[], int | None] = lambda: None) -> None:
        self._store = store
        self._lease = lease
        self.key = f"{prefix}view"
        self._committed: str | None = None  # the mark of the newest view that this agent knows to be committed
        self._views: dict[str, View] = {}

    def publish(self, view: View) -> None:
        """Makes `view` the first one of the job.

        Raises Conflict if there is one, EtcdUnavailable if etcd is away: then, unless it says otherwise, it may be published.
        """
        text = self.propose(view)
        try:
            self._store.compare_and_put(self.key, text, 0, lease=self._lease())
        except EtcdUnavailable:
            if not self.holds(text):  # the answer was lost, maybe not the write
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
        """The view of this mark is the committed one."""
        self._committed = text

    def missing(self) -> dict[str, str]:
        """The key and value to write where etcd has lost the mark of the committed view, has an older one, or something that is no mark.

        Raises Conflict if it has a newer one that this agent has not proposed.
        """
        if self._committed is None:
            return {}
        entry = self._store.get(self.key)
        there, known = number(None if entry is None else entry.value), number(self._committed)
        if there is not None and known is not None and there >= known:
            if entry is not None and entry.value != self._committed and entry.value not in self._views:
                raise Conflict(f"{self.key} names epoch {there[0]}, attempt {there[1]}, which this agent has not proposed")
            return {}
        return {self.key: self._committed}

    def watch(
        self,
        callback: Callable[[View], None],
        strange: Callable[[str], None] = lambda _: None,
        failed: Callable[[ElasticError], None] = lambda _: None,
    ) -> None:
        """Calls back, from a thread, with every committed view that this agent has proposed; `strange` gets a sentence about what else is
        written there."""

        def changed(entry: Entry) -> None:
            if entry.key != self.key or entry.value is None:
                return
            view = self._views.get(entry.value)
            if view is not None:
                callback(view)
            elif entry.value != self._committed:
                strange(f"{self.key} was overwritten by somebody with {entry.value[:60]!r}")

        self._store.watch_prefix(self.key, changed, failed)
