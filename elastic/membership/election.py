"""Which agent speaks for the job: the one whose key is there. The key goes with its lease."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from elastic.errors import Conflict
from elastic.membership.etcd import Compare, Entry


class ElectionStore(Protocol):
    """What an election needs of an etcd client."""

    def get(self, key: str) -> Entry | None: ...
    def put_if_absent(self, key: str, value: str, *, lease: int | None = None) -> int: ...


class Election:
    """The candidate `name`, which must be unique among all agents; `lease` gives the lease that it holds now."""

    def __init__(self, store: ElectionStore, key: str, name: str, lease: Callable[[], int]) -> None:
        self._store = store
        self._key = key
        self._name = name
        self._lease = lease

    def hold(self) -> Compare:
        """Wins the election if nobody holds it; what a transaction demands so that it counts only while this agent still does.

        Raises Conflict if another agent holds it, EtcdUnavailable.
        """
        entry = self._store.get(self._key)
        if entry is None:
            revision = self._store.put_if_absent(self._key, self._name, lease=self._lease())
        elif entry.value == self._name:
            revision = entry.mod_revision
        else:
            raise Conflict(f"agent {entry.value} coordinates the job")
        return Compare(key=self._key, mod_revision=revision)
