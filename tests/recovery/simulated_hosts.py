"""Makes workers of one agent be on several hosts, as far as the job's coordinator sees, and lets hosts be lost.

Worker n is on host n modulo `SIMULATED_HOSTS`. A host is lost when its workers are killed and the file `SIMULATED_LOST` has a line with the
host and the first worker that is started there later: nothing of what earlier ones have left in memory is offered. So a job that loses a
host takes no longer than one in which a worker dies.
"""

from __future__ import annotations

import os
from pathlib import Path

from elastic.agent.hosts import Hosts
from elastic.agent.segments import Segments
from elastic.agent.supervision import WorkerProcess
from elastic.recovery.inventory import Inventory

COUNT, LOST = "SIMULATED_HOSTS", "SIMULATED_LOST"


def host_of(worker: int) -> int:
    return worker % int(os.environ[COUNT])


def name_of(worker: int) -> str:
    return f"host-{host_of(worker)}"


def lost(worker: int) -> bool:
    """Whether the worker's host was lost after the worker was started."""
    path = Path(os.environ[LOST])
    lines = path.read_text().splitlines() if path.exists() else []
    return any(host == host_of(worker) and worker < first for host, first in (map(int, line.split()) for line in lines))


def simulate() -> None:
    """Patches the agent that this process becomes."""
    offer = Segments.offer

    def offered(self: Segments, worker: WorkerProcess) -> Inventory | None:
        return None if lost(worker.number) else offer(self, worker)

    Segments.offer = offered
    Hosts.host_of = lambda _, worker: name_of(worker)


if os.environ.get(COUNT):
    simulate()
