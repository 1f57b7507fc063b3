"""Plans for devices of one kind in several zones: a stage may have members in any zone, placed by the links.

The exact search takes all replicas of a stage from one zone, since it treats the devices of a zone as equal. Here all devices are first
assumed to be in one zone with the slowest links, and the layers are divided for that. Then devices are placed by the actual links. The
result is predicted by the cluster's own cost model, and competes with the result of the exact search.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from elastic.errors import PlanError
from elastic.plan.cluster import Cluster, LinkEnd, Links
from elastic.plan.curves import Curve
from elastic.plan.deploy import Deployed, Device, DeviceSlot
from elastic.plan.division.division import Division, Section
from elastic.plan.division.physical import PhysicalRules
from elastic.plan.division.search import SearchLimits, divide
from elastic.plan.division.shapes import Shape, together
from elastic.plan.placement import place

MOST_DEVICES = 256
BUDGET = 4_000_000
"""Effort of the placement, in pairs of devices: under half a second."""

_SIZE = 64e6
"""Message size, in bytes, at which links are compared."""


@dataclass(frozen=True, slots=True)
class Slowest:
    """Links that are all as slow as the slowest one between any two places of a cluster."""

    links: Links
    places: tuple[LinkEnd, ...]

    def curve(self, sender: LinkEnd, receiver: LinkEnd) -> Curve:
        return max((self.links.curve(*ends) for ends in product(self.places, repeat=2)), key=lambda curve: float(curve.seconds(_SIZE)))


def across_zones(rules: PhysicalRules, batch: int, limits: SearchLimits, available: Collection[Device]) -> Deployed | None:
    """Returns a plan for all `available` devices of a cluster; None if they are of several kinds or in one zone, or no plan was found."""
    cluster = rules.cluster
    zones = tuple(LinkEnd(zone, kind) for kind, zone in cluster.counts())
    if len(zones) == 1 or len(cluster.kinds) > 1 or len(available) > MOST_DEVICES:
        return None
    try:
        whole = replace(cluster, hosts=tuple(replace(host, zone="") for host in cluster.hosts), links=Slowest(cluster.links, zones))
        division = divide(PhysicalRules(whole, rules.profiles), batch, limits)
        if any(shape.tp > 1 for stage in division.stages for shape in stage.makeup.shapes):
            return None
        return _placed(rules, division, sorted(available))
    except PlanError:  # not connected, or it does not fit: the exact search reports that
        return None


def _placed(rules: PhysicalRules, division: Division, available: Sequence[Device]) -> Deployed | None:
    layers, depth = rules.profiles.bytes[1], len(division.stages)
    used = list(available)[: depth * division.replicas]
    exchange = max(sum(layers[layer].parameters for layer in stage.layers) for stage in division.stages)
    boundary = max((layers[stage.layers.stop - 1].output for stage in division.stages[:-1]), default=0.0) * division.micro_batch
    latency_s, bytes_per_s = _links(rules.cluster, used, exchange / division.replicas)
    found = place(latency_s, bytes_per_s, depth, exchange, boundary * division.micro_batches, budget=BUDGET)
    zones = {host.name: host.zone for host in rules.cluster.hosts}
    pools = {pool.zone: number for number, pool in enumerate(rules.pools)}
    devices = {DeviceSlot(stage, replica, 0): used[at] for stage, group in enumerate(found.groups) for replica, at in enumerate(group)}
    sections = tuple(
        Section(layers=stage.layers, makeup=together(Shape(pools[zones[used[at].host]], 1) for at in group))
        for stage, group in zip(division.stages, found.groups, strict=True)
    )
    there = replace(division, stages=sections, exact=False)
    deployed = Deployed.of(rules.cluster, rules, there, devices, "stages across zones, with devices placed by the links")
    return deployed if deployed.prediction.fits else None


def _links(cluster: Cluster, devices: Sequence[Device], size: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns seconds of latency, and bytes/s for messages of `size` bytes, both (devices, devices); 0 bytes/s without a connection."""
    hosts = {host.name: LinkEnd(host.zone, host.kind, 1, host.name) for host in cluster.hosts}
    names = list(hosts)
    latency_s, bytes_per_s = np.zeros((2, len(names), len(names)))
    for (i, one), (j, other) in product(enumerate(names), repeat=2):
        try:
            curve = cluster.links.curve(hosts[one], hosts[other])
        except PlanError:
            continue
        latency_s[i, j] = float(curve.seconds(1.0))
        bytes_per_s[i, j] = size / max(float(curve.seconds(size)) - latency_s[i, j], 1e-12)
    at = [names.index(device.host) for device in devices]
    return latency_s[np.ix_(at, at)], bytes_per_s[np.ix_(at, at)]
