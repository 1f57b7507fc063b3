"""Times the new plan after the loss of one device. Since it was prepared, this is relabelling, comparing and choosing senders."""

from __future__ import annotations

import statistics
import time
from typing import Any

from elastic.plan.cluster import Cluster, DeviceKind, Host, Levels
from elastic.plan.curves import Constant
from elastic.plan.deploy import devices
from elastic.plan.replan import after_loss, plan_for, prepare
from elastic.plan.transformer import Transformer

_PER_HOST = 8
_MODEL = Transformer(layers=24, hidden=2048, heads=16, sequence=2048, vocabulary=50304, utilisation=0.4, sizes=(1, 2, 4))


def cluster(workers: int) -> Cluster:
    """Hosts of eight devices, alternately of two kinds."""
    kinds = {
        "fast": DeviceKind(name="fast", memory_bytes=40 * 2**30, flops=312e12),
        "slow": DeviceKind(name="slow", memory_bytes=16 * 2**30, flops=125e12),
    }
    hosts = [
        Host(name=f"h{start // _PER_HOST}", zone="z", kind=("fast", "slow")[start // _PER_HOST % 2], count=min(_PER_HOST, workers - start))
        for start in range(0, workers, _PER_HOST)
    ]
    links = Levels(within_host=Constant(latency_s=1e-5, bytes_per_s=100e9), within_zone=Constant(latency_s=5e-5, bytes_per_s=6e9))
    return Cluster(kinds={host.kind: kinds[host.kind] for host in hosts}, hosts=tuple(hosts), links=links)


def replan(workers: int, repeat: int) -> dict[str, Any]:
    """Returns seconds to plan, to prepare for the loss of any one device or host, and (median of `repeat`) to replan after a loss."""
    there = cluster(workers)
    batch = 4 * workers
    started = time.perf_counter()
    planned = plan_for(there, _MODEL.profiles(there), batch)
    planned_s, started = time.perf_counter() - started, time.perf_counter()
    prepared = prepare(planned, batch)
    prepared_s = time.perf_counter() - started
    hit = list(planned.devices.values())
    seconds: list[float] = []
    for number in range(repeat):
        gone = {hit[number * len(hit) // repeat]}
        started = time.perf_counter()
        then = after_loss(planned, gone, batch, prepared=prepared)
        seconds.append(time.perf_counter() - started)
    return {
        "workers": len(devices(there)),
        "plan_s": planned_s,
        "prepare_s": prepared_s,
        "classes": prepared.classes,
        "replan_s": statistics.median(seconds),
        "replan_most_s": max(seconds),
        "step_s": planned.plan.step_s,
        "step_after_s": then.deployed.plan.step_s,
        "moved_bytes": then.move.moved_bytes,
        "moving_s": then.move.transfers.finish_s,
    }
