"""The wait-for graph of a job's workers: who keeps whom waiting. A worker that waits for another is a victim, and never blamed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from elastic.health.evidence import Observed
from elastic.observe.activity import AGENT, NOBODY

MUTE_S = 5.0
"""After how many seconds without a run of Python code a worker in a circle is not believed to wait."""


def believed(seen: Sequence[Observed]) -> list[Observed]:
    """Returns the observations without waits that have ended, although their worker could not record that.

    If a thread holds the interpreter lock for ever, what the training thread waits for has come, and it cannot go on. All others soon wait
    for it, which closes a circle. So a worker in a circle is not believed to wait if it is the only one there in which no code runs.
    """
    waits = {each.worker: each.waits_for for each in seen if each.waits_for >= 0 and not each.stopped}
    mute = {each.worker for each in seen if each.mute_s >= MUTE_S}
    wrong = {worker for worker in mute & waits.keys() if _circle(worker, waits) & mute == {worker}}
    return [
        replace(each, standing=replace(each.standing, waits_for=NOBODY)) if each.worker in wrong and each.standing else each
        for each in seen
    ]


def _circle(worker: int, waits: dict[int, int]) -> set[int]:
    """Returns the workers of the circle that `worker` is in; empty if it is in none."""
    passed: list[int] = []
    while worker in waits and worker not in passed:
        passed.append(worker)
        worker = waits[worker]
    return set(passed) if passed and worker == passed[0] else set()


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
