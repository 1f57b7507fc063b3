"""The wait-for graph of a job's workers: who keeps whom waiting. A worker that waits for another is a victim, and never blamed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from elastic.health.evidence import Observed
from elastic.observe.activity import AGENT


def awaited(seen: Sequence[Observed], asked: Iterable[int] = ()) -> dict[int, tuple[int, ...]]:
    """Returns the roots: workers that wait for nobody, each with those that wait for it, directly or through others.

    `asked` are the workers whose answers the agent lacks; it appears as AGENT. A stopped process waits for nobody, whatever its record
    says. Workers that wait for the agent keep nobody waiting, nor do those in a circle: no root can be blamed for it.
    """
    waits = {each.worker: each.waits_for for each in seen if each.waits_for >= 0 and not each.stopped}
    idle = {each.worker for each in seen if each.waits_for == AGENT and not each.stopped}
    known = {each.worker for each in seen}
    found: dict[int, set[int]] = {}
    for waiting, first in [*waits.items(), *((AGENT, worker) for worker in asked)]:
        root = _root(first, waits)
        if root in known and root not in idle:
            found.setdefault(root, set()).add(waiting)
    return {root: tuple(sorted(waiting, key=lambda worker: (worker == AGENT, worker))) for root, waiting in sorted(found.items())}


def _root(worker: int, waits: dict[int, int]) -> int | None:
    """Returns the worker at the end of the chain that begins with `worker`; None if it ends in a circle."""
    passed = {worker}
    while worker in waits:
        worker = waits[worker]
        if worker in passed:
            return None
        passed.add(worker)
    return worker
