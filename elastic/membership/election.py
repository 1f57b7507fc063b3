"""The election of the agent that coordinates the job: the one that the key names. The key expires with its lease.

coordinator    {agent, address}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from elastic.errors import Deposed
from elastic.membership.etcd import Compare, KeyValue


class ElectionStore(Protocol):
    """The part of an etcd client that an election needs."""

    def get(self, key: str) -> KeyValue | None: ...
    def compare_and_put(self, key: str, value: str, expected_mod_revision: int, *, lease: int | None = None) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Leader:
    """The agent that coordinates the job, and its address for other agents, `[ip, port]`."""

    agent: str
    address: list[Any] | None


class Election:
    """The candidate `name`, which must be unique among all agents; `lease` returns its current lease.

    `address` is where agents of other hosts can reach it, `[ip, port]`; None if it is the job's only agent.
    """

    def __init__(self, store: ElectionStore, key: str, name: str, lease: Callable[[], int], address: Sequence[Any] | None = None) -> None:
        self._store = store
        self._key = key
        self._name = name
        self._lease = lease
        self.address = address

    def leader(self) -> Leader | None:
        """Returns the agent that coordinates the job, None if there is none now. Raises EtcdUnavailable."""
        entry = self._store.get(self._key)
        if entry is None or _elected(entry.value) is None:
            return None
        found = json.loads(entry.value or "")
        return Leader(agent=found["agent"], address=found.get("address"))

    def held(self) -> bool:
        """Whether this agent coordinates the job, as far as etcd knows. Raises EtcdUnavailable."""
        leader = self.leader()
        return leader is not None and leader.agent == self._name

    def hold(self) -> Compare:
        """Wins the election if no agent holds it. Returns the demand of a transaction that this agent still holds it.

        A key that this agent has written under an earlier lease or with another address is written again.

        Raises Deposed if another agent holds it, EtcdUnavailable.
        """
        entry = self._store.get(self._key)
        elected = None if entry is None else _elected(entry.value)
        if elected is not None and elected != self._name:
            raise Deposed(f"agent {elected} coordinates the job")
        value, lease = json.dumps({"agent": self._name, "address": self.address}), self._lease()
        if entry is not None and entry.value == value and entry.lease == lease:
            return Compare(key=self._key, mod_revision=entry.mod_revision)
        before = 0 if entry is None else entry.mod_revision
        revision = self._store.compare_and_put(self._key, value, before, lease=lease)
        return Compare(key=self._key, mod_revision=revision)


def _elected(value: str | None) -> str | None:
    """Returns the agent that the value names, None if it names none."""
    with suppress(ValueError, TypeError, KeyError):
        found = json.loads(value or "")["agent"]
        return found if isinstance(found, str) else None
    return None
