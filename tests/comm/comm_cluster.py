"""The networks of several workers in one process, for any implementation, and threads to drive them."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elastic.comm import Endpoint, LoopbackHub, LoopbackNetwork, MessageKind, Network, Tag
from elastic.comm.job_certificate import job_credentials
from elastic.comm.tls import Tls

KINDS = ("unix", "tcp", "tls", "loopback")
OVER_TCP = ("tcp", "tls")
PATIENCE_S = 10.0


@dataclass(frozen=True)
class Peer:
    worker: int
    host: str
    address: str


def tag(step: int = 1, a: int = 0) -> Tag:
    return Tag(MessageKind.GRADIENT, step, a)


def pattern(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


class Cluster:
    """Networks by worker id. `install` makes every given worker link to all the others, concurrently.

    `directory` is where those of kind "unix" listen, as a job's workers do.
    """

    def __init__(self, kind: str, workers: Iterable[int]) -> None:
        self.kind = kind
        self.hub = LoopbackHub()
        self.directory = Path(tempfile.mkdtemp(prefix="elastic-test-"))
        self.threads = ThreadPoolExecutor(32)
        self.networks: dict[int, Endpoint] = {}
        self.attempt_id = (0, 0)
        for worker in workers:
            self.start(worker)

    def start(self, worker: int, secret: bytes = b"secret") -> Endpoint:
        if self.kind == "loopback":
            self.networks[worker] = LoopbackNetwork(worker, self.hub)
        else:
            directory = self.directory / "links" if self.kind == "unix" else None
            interface = "127.0.0.1" if self.kind in OVER_TCP else None
            tls = Tls(job_credentials(secret)) if self.kind == "tls" else None
            self.networks[worker] = Network(
                worker, secret=secret, host=self.host(worker), directory=directory, interface=interface, tls=tls
            )
        return self.networks[worker]

    def host(self, worker: int) -> str:
        return f"host-{worker}" if self.kind in OVER_TCP else "host"

    def __getitem__(self, worker: int) -> Any:
        return self.networks[worker]

    def members(self, workers: Iterable[int]) -> list[Peer]:
        return [Peer(worker, self.host(worker), self.networks[worker].address) for worker in workers]

    def install(self, workers: Iterable[int], attempt_id: tuple[int, int] | None = None) -> Cluster:
        workers = list(workers)
        self.attempt_id = attempt_id or (self.attempt_id[0] + 1, 0)
        members = self.members(workers)
        together(*(lambda w=w: self.networks[w].install(*self.attempt_id, members, workers, timeout_s=PATIENCE_S) for w in workers))
        return self

    def run(self, action: Callable[[], Any]) -> Future[Any]:
        return self.threads.submit(action)

    def blocked(self, worker: int, action: Callable[[], Any]) -> Future[Any]:
        """Runs `action` on a thread; returns when that thread waits in the network of `worker`."""
        box = self.networks[worker]._box
        before = len(box._waiters)
        future = self.run(action)
        until(lambda: future.done() or len(box._waiters) > before)
        return future

    def close(self) -> None:
        for network in self.networks.values():
            network.close()
        self.threads.shutdown()
        shutil.rmtree(self.directory, ignore_errors=True)


def together(*actions: Callable[[], Any]) -> list[Any]:
    """Runs all at once; raises the first error."""
    with ThreadPoolExecutor(len(actions)) as threads:
        return [future.result(PATIENCE_S) for future in [threads.submit(action) for action in actions]]


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        os.sched_yield()


def clusters(kind: str) -> Iterator[Callable[..., Cluster]]:
    """Yields a function that makes clusters of workers 0..n-1, linked to each other; closes them afterwards."""
    made: list[Cluster] = []

    def make(size: int, installed: bool = True) -> Cluster:
        made.append(Cluster(kind, range(size)))
        return made[-1].install(range(size)) if installed else made[-1]

    yield make
    for each in made:
        each.close()
