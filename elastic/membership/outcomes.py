"""How a job of several hosts has ended, left at etcd for a while: a host that was cut off then hears of it when it comes back.

/elastic/<name>/ended/<incarnation>    the outcome, as the coordinator's launcher got it, with a lease of its own
"""

from __future__ import annotations

import json
from typing import Any

from elastic.membership.etcd import ROOT, VALUE_BYTES, EtcdClient

KEPT_S = 600
"""Seconds that an outcome can be read."""


def leave(client: EtcdClient, name: str, incarnation: str, outcome: dict[str, Any]) -> None:
    """Leaves an outcome; incidents are left out if they make it too large, and one with a large value says that it cannot be had here.

    Raises EtcdUnavailable.
    """
    client.put(_key(name, incarnation), _fitting(name, outcome), lease=client.grant(KEPT_S))


def left(client: EtcdClient, name: str, incarnation: str) -> dict[str, Any] | None:
    """Returns the outcome of an incarnation; None if it has left none. Raises EtcdUnavailable."""
    entry = client.get(_key(name, incarnation))
    try:
        found = None if entry is None else json.loads(entry.value or "")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _key(name: str, incarnation: str) -> str:
    return f"{ROOT}{name}/ended/{incarnation}"


def _fitting(name: str, outcome: dict[str, Any]) -> str:
    well = f"the job {name} has ended well while this host was cut off from it"
    why = f"{well}; its value is too large to be left at etcd: other hosts have it"
    for content in (outcome, {**outcome, "incidents": []}, {"type": "failed", "kind": "JobFailed", "message": why}):
        text = json.dumps(content)
        if len(text.encode()) < VALUE_BYTES:
            return text
    raise AssertionError  # the last one is short
