"""The election of the agent that coordinates the job: the one that the key names. The key expires with its lease.

coordinator    {agent}
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from elastic.errors import Conflict
from elastic.membership.etcd import Compare, KeyValue


class ElectionStore(Protocol):
    """The part of an etcd client that an election needs."""

    def get(self, key: str) -> KeyValue | None: ...
    def compare_and_put(self, key: str, value: str, expected_mod_revision: int, *, lease: int | None = None) -> int: ...


class Election:
    """The candidate `name`, which must be unique among all agents; `lease` returns its current lease."""

    def __init__(self, store: ElectionStore, key: str, name: str, lease: Callable[[], int]) -> None:
        self._store = store
        self._key = key
        self._name = name
        self._lease = lease

    def hold(self) -> Compare:
        """Wins the election if no agent holds it. Returns the demand of a transaction that this agent still holds it.

        Raises Conflict if another agent holds it, EtcdUnavailable.
        """
        entry = self._store.get(self._key)
        elected = None if entry is None else _elected(entry.value)
        if elected is not None and elected != self._name:
            raise Conflict(f"agent {elected} coordinates the job")
        if entry is not None and elected is not None:
            return Compare(key=self._key, mod_revision=entry.mod_revision)
        before = 0 if entry is None else entry.mod_revision
        revision = self._store.compare_and_put(self._key, json.dumps({"agent": self._name}), before, lease=self._lease())
        return Compare(key=self._key, mod_revision=revision)


def _elected(value: str | None) -> str | None:
    """Returns the agent that the value names, None if it names none."""
    with suppress(ValueError, TypeError, KeyError):
        found = json.loads(value or "")["agent"]
        return found if isinstance(found, str) else None
    return None
