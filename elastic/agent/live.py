"""How a job stands now, as JSON: for `elastic top`, metrics and the file `live.json`."""

from __future__ import annotations

import heapq
import math
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from elastic.health.evidence import Observed
from elastic.observe.activity import AGENT, NOBODY

if TYPE_CHECKING:
    from elastic.agent.coordinator import Coordinator

VERSION = 1
_WORKERS = 200  # so many can be described each second: for more it takes longer, and is done less often
_LINKS = 500  # the slowest ones


def pause_s(coordinator: Coordinator) -> float:
    """Returns the seconds until the next record: one, and more in a job of many workers."""
    driver = coordinator.driver
    return 1.0 if driver is None else max(1.0, len(driver.view.workers) / _WORKERS)


def standing(coordinator: Coordinator) -> dict[str, Any]:
    """Returns how the job stands: workers of the view and spares with what they do, hosts, stages, links, the newest step.

    `at` is the time of day in seconds; other times are durations in seconds, memory is in bytes. Unknown values are None.
    """
    hosts, driver, record = coordinator.hosts, coordinator.driver, coordinator.record
    view = None if driver is None else driver.view
    members = () if view is None else view.workers
    spares = () if driver is None else tuple(sorted(driver.state.spares))
    newest = record.steps.newest
    seen = {each.worker: each for each in hosts.look([*members, *spares])}
    return {
        "version": VERSION,
        "at": round(time.time(), 3),
        "job": coordinator.name,
        "pid": os.getpid(),
        "phase": "founding" if driver is None else driver.state.phase.value,
        "epoch": 0 if view is None else view.epoch,
        "step": None if newest is None else newest.step,
        "of": None if newest is None else newest.of,
        "loss": None if newest is None else newest.loss,
        "seconds": None if newest is None else newest.seconds,
        "samples_per_second": None if newest is None else newest.samples_per_second,
        "tokens_per_second": None if newest is None else newest.tokens_per_second,
        "flops_per_second": None if newest is None else newest.flops_per_second,
        "mfu": None if newest is None else newest.mfu,
        "layout": "" if view is None else view.plan.summary,
        "stages": [] if view is None else [[s.layers.start, s.layers.stop, list(s.members)] for s in view.plan.stages],
        "copies": "" if view is None else view.copies,
        "copies_kept": None if view is None else view.copies_kept,
        "copies_wanted": None if view is None else view.site.copies,
        "coordinator": hosts.local.name,
        "incidents": 0 if driver is None else len(driver.incidents),
        "hosts": [
            {"name": each.name, "room": each.room, "spares": each.spares, "rack": each.facts.rack, "draining": each.name in hosts.draining}
            for each in hosts.present.values()
        ],
        "workers": [_worker(coordinator, worker, seen.get(worker), spare=worker in spares) for worker in (*members, *spares)],
        "links": _links(record.links),
    }


def _links(known: Mapping[tuple[int, int], tuple[float | None, float | None]]) -> list[list[float | None]]:
    slowest = heapq.nsmallest(_LINKS, known.items(), key=lambda link: link[1][1] or math.inf)
    return [[*pair, *speeds] for pair, speeds in sorted(slowest)]


def _worker(coordinator: Coordinator, worker: int, seen: Observed | None, *, spare: bool) -> dict[str, Any]:
    hosts, told = coordinator.hosts, coordinator.record.progress.get(worker, {})
    doing, at = (None, None) if seen is None else (seen.doing, seen.standing)
    return {
        "worker": worker,
        "host": hosts.host_of(worker),
        "pid": None if seen is None else seen.pid,
        "spare": spare,
        "state": "" if seen is None else seen.state,
        "phase": None if doing is None else doing.phase,
        "step": hosts.worker(worker).step if doing is None else doing.step,
        "micro_batch": None if doing is None or doing.micro_batch < 0 else doing.micro_batch,
        "for_s": None if doing is None or seen is None else round(seen.age_s, 3),
        "place": None if at is None else at.place,
        "waits_for": None if at is None or at.waits_for == NOBODY else "agent" if at.waits_for == AGENT else at.waits_for,
        "step_s": told.get("step_s"),
        "memory": told.get("memory"),
    }
