"""The cost model of clusters, from profiles of layers and links by place; nothing is fitted to measured runs.

- A transfer between stages occupies both ends, as blocking point-to-point calls do: a stage in the middle is charged for receiving and
  sending in both directions.
- With tensor parallelism every device sends the whole activations, which are replicated, over its own network interface: the link is that
  of one device, not of all.
- More samples are never less work: if a layer was profiled slower for a smaller micro-batch, that is noise.
- Besides parameters, gradients, moments and the activations in flight, memory holds: the gradients of the layer that is running backward,
  about as large as its activations; the bucket into which gradients are flattened; a message in each direction at each boundary; and
  one communicator each for tensor parallelism, data parallelism and stages.

The update is that of a stage's first layer: profiles list the same update for all layers of a model, whatever their parameters.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from elastic.errors import PlanError
from elastic.plan.cluster import Cluster, LinkEnd
from elastic.plan.curves import Curve
from elastic.plan.division.rules import Bytes, Floats, Transfers, spans
from elastic.plan.division.shapes import Makeup, Pool, Shape
from elastic.plan.profiles import Profiles

BUCKET_BYTES = 5e8
STATE_PER_PARAMETER_BYTE = 6
"""24 bytes for each parameter of 4: value, gradient, moments, and other bytes that the optimizer needs."""
BASE_BYTES, COMMUNICATOR_BYTES = 2e9, 1e9
"""Bytes on a device besides the model; and bytes of each communicator."""


class PhysicalRules:
    """The rules described above. Raises PlanError if a kind of the cluster has no profile."""

    transfers = Transfers(first=(2.0,), middle=2.0, last=2.0)

    def __init__(self, cluster: Cluster, profiles: Profiles) -> None:
        profiles.check_kinds({host.kind: cluster.kinds[host.kind] for host in cluster.hosts})
        self.cluster, self.profiles = cluster, profiles.without_noise()
        self.layers = profiles.layers
        self.pools = tuple(Pool(kind, zone, count) for (kind, zone), count in cluster.counts().items())
        self._weights = spans(np.array([layer.parameters for layer in profiles.bytes[1]])).clip(0)

    def micro_batch_sizes(self) -> tuple[int, ...]:
        return self.profiles.sizes()

    def shapes(self, size: int) -> tuple[Shape, ...]:
        return tuple(Shape(number, tp) for number, pool in enumerate(self.pools) for tp in self.profiles.degrees(pool.kind, size))

    def seconds(self, shape: Shape, size: int) -> Floats:
        rows = self.profiles.of(self.pools[shape.pool].kind, size, shape.tp)
        return np.array([row.forward_s + row.backward_s for row in rows])

    def update_s(self, shape: Shape, size: int) -> Floats:
        rows = self.profiles.of(self.pools[shape.pool].kind, size, shape.tp)
        first = np.array([row.update_s for row in rows] + [0.0])
        return np.broadcast_to(first[:, None], (self.layers + 1, self.layers + 1))

    def footprint(self, shape: Shape, size: int, shared: bool) -> Bytes:
        sizes = self.profiles.bytes[shape.tp]
        n = self.layers + 1
        parameters = spans(np.array([layer.parameters for layer in sizes]))
        running = size * _largest([layer.activations for layer in sizes])
        edges = np.zeros((n, n))
        edges[1:, :] += 2 * size * np.array([layer.output for layer in self.profiles.bytes[1]])[:, None]
        edges[:, :-1] += 2 * size * np.array([0.0, *(layer.output for layer in self.profiles.bytes[1][:-1])])[None, :]
        alone = np.zeros((n, n), dtype=bool)
        alone[0, -1] = True
        communicators = int(shape.tp > 1) + int(shared) + ~alone
        return Bytes(
            fixed=(STATE_PER_PARAMETER_BYTE * parameters + np.clip(parameters, 0, BUCKET_BYTES))
            + (running + edges + BASE_BYTES + COMMUNICATOR_BYTES * communicators),
            in_flight=size * spans(np.array([layer.activations for layer in sizes])),
            capacity=self.cluster.kinds[self.pools[shape.pool].kind].memory_bytes,
        )

    def forward_s(self, sender: Shape, receiver: Shape, size: int) -> Floats:
        curve = self.link(self.place(sender), self.place(receiver))
        sent = [0.0, *(layer.output * size for layer in self.profiles.bytes[1][:-1]), 0.0]
        return np.full(len(sent), math.inf) if curve is None else curve.seconds(sent)

    def backward_s(self, sender: Shape, receiver: Shape, size: int) -> Floats:
        """Seconds of gradients, which are as large as the activations over the same boundary."""
        return self.forward_s(receiver, sender, size)

    def sync_s(self, makeup: Makeup) -> Floats:
        """Seconds of the slowest ring between neighbouring replicas."""
        weights = self._weights / self.least_share(makeup)
        pairs = {(a, a) for a, count in makeup.parts if count > 1} | set(pairwise(makeup.shapes))
        found = np.zeros_like(weights)
        for one, other in pairs:
            curve = self.link(self.place(one), self.place(other))
            found = np.maximum(found, math.inf if curve is None else all_reduce_s(weights, makeup.replicas, curve))
        return found

    def least_share(self, makeup: Makeup) -> int:
        """The least number of devices that the weights of a stage are spread over."""
        return min(shape.tp for shape in makeup.shapes)

    def place(self, shape: Shape) -> LinkEnd:
        """One device of a replica, as the end of a link."""
        pool = self.pools[shape.pool]
        return LinkEnd(pool.zone, pool.kind)

    def link(self, one: LinkEnd, other: LinkEnd) -> Curve | None:
        """The link between two ends; None if they are not connected."""
        try:
            return self.cluster.links.curve(one, other)
        except PlanError:
            return None


def all_reduce_s(size: Floats, members: int, curve: Curve) -> Floats:
    """Returns the seconds of a ring all-reduce: 2 (n - 1) messages of an n-th, one bucket after the other."""
    if members < 2:
        return np.zeros_like(size)
    buckets, rest = np.divmod(size, BUCKET_BYTES)
    whole, part = curve.seconds(BUCKET_BYTES / members), curve.seconds(rest / members)
    return 2 * (members - 1) * (buckets * whole + part)


def _largest(per_layer: list[float]) -> Floats:
    """Returns the largest value over `[first, stop)`; 0 if that is empty."""
    values = np.array(per_layer)
    found = np.zeros((len(values) + 1, len(values) + 1))
    for first in range(len(values)):
        found[first, first + 1 :] = np.maximum.accumulate(values[first:])
    return found
