"""Measurements of `decisions.py` that grow with the workers and parameters of a job: 1,000 workers, 5,000 parameters."""

from __future__ import annotations

import gc
import itertools
import json
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from elastic.checkpoint.saver import Backoff
from elastic.comm import LoopbackHub, LoopbackNetwork, Rounds
from elastic.control.preparing import Preparing
from elastic.engine.digests import digest
from elastic.engine.exact import terms
from elastic.engine.norms import norm
from elastic.host.channel import Channel, encoded
from elastic.layout.layout import Layout, spread
from elastic.layout.regions import LayerSpec, ModelSpec
from elastic.layout.transfer import PARAM, Holding, holdings_of, minimum_by_layer, transfers
from elastic.plan.site import Site
from elastic.plan.workload import LayerCost, Workload
from elastic.view import Member, View

Decide = Callable[[], Any]

_STATES = [PARAM, "exp_avg", "exp_avg_sq"]
_BLOCKS = 7_000_000_000 // 4096


def terms_of_blocks() -> Decide:
    """Computes what one of 8 workers sends in READY."""
    values = np.random.default_rng(0).standard_normal(_BLOCKS // 8) ** 2
    return lambda: terms(values)


def norm_of_terms() -> Decide:
    """Computes the norm from all READY messages, as the coordinator does."""
    received = [terms(np.random.default_rng(worker).standard_normal(_BLOCKS // 8) ** 2) for worker in range(8)]
    return lambda: norm(received)


def digesting() -> Decide:
    """Computes a digest on 4 workers, which are threads here."""
    workers, count = range(4), itertools.count(1)
    hub = LoopbackHub()
    networks = [LoopbackNetwork(worker, hub) for worker in workers]
    members: list[Any] = [SimpleNamespace(worker=worker, host="host", address="") for worker in workers]
    names = [f"layers.{i:04}.weight" for i in range(5000)]
    values = dict.fromkeys(names, np.zeros(4096, np.uint8))
    sizes, holders = dict.fromkeys(names, 4096), {name: i % 4 for i, name in enumerate(names)}

    def one(worker: int, epoch: int) -> str:
        networks[worker].install(epoch, 0, members, workers)
        rounds = Rounds(networks[worker], worker, list(workers), 0)
        return digest(rounds, itertools.count().__next__, worker, sizes, holders, values.__getitem__)

    def all_of_them() -> None:
        epoch = next(count)
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(one, workers, [epoch] * 4))

    return all_of_them


class _Sink:
    """A socket that accepts all bytes."""

    def send(self, data: bytearray, flags: int) -> int:
        return len(data)


def sending() -> Decide:
    """Sends a proposal with 1,000 transfers to 1,000 workers."""
    message = {"type": "propose", "proposal": {"transfers": [[1, 2, "exp_avg", 3, i, i + 4096] for i in range(1000)]}}
    channels = [Channel(cast(socket.socket, _Sink())) for _ in range(1000)]

    def send_to_all() -> None:
        line = encoded(message)
        for channel in channels:
            channel.send_line(line)

    return send_to_all


class _ByteSource:
    """A socket that delivers a message in small parts."""

    def __init__(self, data: bytes) -> None:
        self._data, self._position = data, 0

    def recvmsg(self, size: int, ancillary: int, flags: int) -> tuple[bytes, list[Any], int, None]:
        start, self._position = self._position, self._position + 65_536
        return self._data[start : self._position], [], 0, None


def receiving() -> Decide:
    """Receives a message of 16 MB in parts of 64 KiB."""
    line = json.dumps({"text": "x" * (16 << 20)}).encode() + b"\n"

    def receive() -> None:
        channel = Channel(cast(socket.socket, _ByteSource(line)))
        while not channel.receive():
            continue

    return receive


def _loss() -> tuple[list[Holding], Layout]:
    model = ModelSpec(layers=tuple(LayerSpec.build(i, [("weight", (4096 * 4000,), "float32")]) for i in range(32)))
    stages = [(range(4 * stage, 4 * stage + 4), range(125 * stage, 125 * stage + 125)) for stage in range(8)]
    before = spread(model, stages)
    left = [(layers, [worker for worker in members if worker != 37]) for layers, members in stages]
    return list(holdings_of(before, _STATES, [worker for worker in range(1000) if worker != 37])), spread(model, left, near=before)


def moving() -> Decide:
    holdings, layout = _loss()
    return lambda: transfers(holdings, layout, _STATES)


def least() -> Decide:
    """Computes the least bytes to move. They are only for the report, so a job computes them after the recovery."""
    holdings, layout = _loss()
    return lambda: minimum_by_layer(holdings, layout, _STATES)


class _ManualTimers:
    """Stores the function of the one timer, for the benchmark to call."""

    def __init__(self) -> None:
        self.act: Callable[[], None] = lambda: None
        self.seconds = 0.0

    def set_timer(self, seconds: float, act: Callable[[], None], name: str = "") -> None:
        self.seconds, self.act = seconds, act

    def clear_timer(self, name: str = "") -> None:
        self.act = lambda: None


def longest_slice_ms() -> float:
    """Returns how long preparing for losses blocks the agent: 125 hosts of 8 workers, 32 layers, 1,024 micro-batches."""
    members = tuple(Member(worker=i, host=f"host-{i // 8}", address="") for i in range(1000))
    layers = tuple(LayerCost(forward_s=0.01 + 0.001 * i, backward_s=0.02, parameters=1000, activation_bytes=0) for i in range(32))
    workload = Workload(layers=layers, micro_batches=1024, grains=1024)
    site = Site(memory={f"host-{i}": 1 << 40 for i in range(125)})
    view = SimpleNamespace(members=members, workers=tuple(range(1000)), workload=workload, site=site)
    timers = _ManualTimers()
    preparing = Preparing(timers, time.perf_counter, None, dict, lambda: True)
    preparing.begin(cast(View, view))
    gc.collect()
    gc.freeze()  # excludes torch and other objects that an agent does not have: collecting them takes 100 ms
    taken: list[float] = []
    while not taken or timers.seconds < 1.0:
        began = time.process_time()
        timers.act()
        taken.append(time.process_time() - began)
    return round(1000 * max(taken), 2)


def checks_while_waiting() -> int:
    """Returns how often a wait of 10 s checks for one file."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    waiting, count = Backoff(0.005, lambda: now[0], sleep), 0
    while waiting.seconds < 10:
        waiting.pause()
        count += 1
    return count


GROWTH: dict[str, Callable[[], Decide]] = {
    "READY: one of 8 workers, 7 billion parameters": terms_of_blocks,
    "READY: the norm, coordinator": norm_of_terms,
    "digest: 5,000 parameters, 4 workers": digesting,
    "a proposal sent to 1,000 workers": sending,
    "a message of 16 MB received": receiving,
    "transfers after a loss: 1,000 workers": moving,
    "the least bytes, after the recovery: 1,000 workers": least,
}

COUNTS: dict[str, Callable[[], float]] = {
    "preparing for losses of 1,000 workers, longest slice (ms)": longest_slice_ms,
    "checks by a saver that waits 10 s (count)": checks_while_waiting,
}
