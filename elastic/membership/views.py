"""The view in etcd: one key, changed only by compare-and-swap."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Protocol

from elastic.errors import EtcdUnavailable
from elastic.membership.etcd import Entry
from elastic.view import View


class KeyStore(Protocol):
    """What the view needs of an etcd client."""

    def get(self, key: str) -> Entry | None: ...
    def compare_and_put(self, key: str, value: str, expected_mod_revision: int) -> int: ...
    def watch_prefix(self, prefix: str, callback: Callable[[Entry], None]) -> None: ...


def job_prefix(job: str) -> str:
    """The prefix of everything that etcd holds about a job."""
    return f"/elastic/{job}/"


class ViewStore:
    """The views of one job."""

    def __init__(self, store: KeyStore, job: str) -> None:
        self._store = store
        self.key = f"{job_prefix(job)}view"

    def publish(self, view: View, expected_mod_revision: int = 0) -> int:
        """Makes `view` the one of the job if the key is still at the expected revision (0: there is none); its mod_revision.

        Raises Conflict if somebody else was faster, EtcdUnavailable if etcd is away: then, unless it says otherwise, it may be published.
        """
        text = json.dumps(view.to_json())
        try:
            return self._store.compare_and_put(self.key, text, expected_mod_revision)
        except EtcdUnavailable:
            entry = self._store.get(self.key)  # the answer was lost, maybe not the write
            if entry is None or entry.value != text:
                raise
            return entry.mod_revision

    def read(self) -> tuple[View, int] | None:
        """The committed view and its mod_revision, or None before the first."""
        entry = self._store.get(self.key)
        return None if entry is None or entry.value is None else (View.from_json(json.loads(entry.value)), entry.mod_revision)

    def watch(self, callback: Callable[[View, int], None]) -> None:
        """Calls back, from a thread, with every committed view and its mod_revision."""

        def changed(entry: Entry) -> None:
            if entry.key == self.key and entry.value is not None:
                callback(View.from_json(json.loads(entry.value)), entry.mod_revision)

        self._store.watch_prefix(self.key, changed)
