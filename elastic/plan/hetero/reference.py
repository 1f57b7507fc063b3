"""The reference cost rules that the published Sailor data is compared by: see "Reference cost rules" where the data is described.

A common yardstick, not the truth: `elastic.plan.hetero.physical` is nearer to what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from elastic.errors import PlanError
from elastic.plan.cluster import Cluster, Place
from elastic.plan.curves import Curve
from elastic.plan.hetero.rules import Bytes, Floats, Transfers, spans
from elastic.plan.hetero.shapes import Makeup, Pool, Shape
from elastic.plan.profiles import Profiles

BUCKET_BYTES = 5e8
STATE_PER_PARAMETER_BYTE = 6
"""24 bytes for each parameter of 4: values, gradients, moments, and what the optimizer needs beside them."""
BASE_BYTES, COMMUNICATOR_BYTES = 2e9, 1e9
"""What a device holds besides the model; and more of it with tensor parallelism, that is with a communicator."""


class ReferenceRules:
    """The rules, for a cluster and profiles. Raises PlanError if a kind of the cluster has no profile."""

    transfers = Transfers(first=(1.0, 1.0, 1.0, 2.0), middle=1.0, last=2.0)

    def __init__(self, cluster: Cluster, profiles: Profiles) -> None:
        profiles.check_kinds({host.kind: cluster.kinds[host.kind] for host in cluster.hosts})
        self.cluster, self.profiles = cluster, profiles
        self.layers = profiles.layers
        self._weights = spans(np.array([layer.parameters for layer in profiles.bytes[1]])).clip(0)
        self.pools = tuple(Pool(kind, zone, count) for (kind, zone), count in cluster.counts().items())
        self.per_host = [max(host.count for host in cluster.hosts if (host.kind, host.zone) == pool[:2]) for pool in self.pools]

    def micro_batch_sizes(self) -> tuple[int, ...]:
        return self.profiles.sizes()

    def shapes(self, size: int) -> tuple[Shape, ...]:
        return tuple(Shape(number, tp) for number, pool in enumerate(self.pools) for tp in self.profiles.degrees(pool.kind, size))

    def seconds(self, shape: Shape, size: int) -> Floats:
        rows = self.profiles.of(self.pools[shape.pool].kind, size, shape.tp)
        return np.array([row.forward_s + row.backward_s for row in rows])

    def update_s(self, shape: Shape, size: int) -> Floats:
        """That of the stage's first layer."""
        rows = self.profiles.of(self.pools[shape.pool].kind, size, shape.tp)
        first = np.array([row.update_s for row in rows] + [0.0])
        return np.broadcast_to(first[:, None], (self.layers + 1, self.layers + 1))

    def footprint(self, shape: Shape, size: int, shared: bool) -> Bytes:
        sizes = self.profiles.bytes[shape.tp]
        base = BASE_BYTES + (COMMUNICATOR_BYTES if shape.tp > 1 else 0)
        return Bytes(
            fixed=STATE_PER_PARAMETER_BYTE * spans(np.array([layer.parameters for layer in sizes])) + base,
            in_flight=size * spans(np.array([layer.activations for layer in sizes])),
            capacity=self.cluster.kinds[self.pools[shape.pool].kind].memory_bytes,
        )

    def forward_s(self, sender: Shape, receiver: Shape, size: int) -> Floats:
        sent = self.profiles.bytes[1]
        return self.moved_s(sender, receiver, [0.0, *(layer.output * size for layer in sent[:-1]), 0.0])

    def backward_s(self, sender: Shape, receiver: Shape, size: int) -> Floats:
        """As large as the output of the stage's first layer."""
        sent = self.profiles.bytes[1]
        return self.moved_s(sender, receiver, [0.0, *(layer.output * size for layer in sent[1:]), 0.0])

    def moved_s(self, sender: Shape, receiver: Shape, sizes: Sequence[float]) -> Floats:
        """Messages over the link between two replicas; infinite where there is none."""
        curve = self.link(self.place(sender), self.place(receiver))
        return np.full(len(sizes), math.inf) if curve is None else curve.seconds(sizes)

    def sync_s(self, makeup: Makeup) -> Floats:
        """The slowest ring between replicas that follow each other, weights divided by the least tp (at most 4)."""
        weights = self._weights / self.least_share(makeup)
        replicas, shapes = makeup.replicas, makeup.shapes
        pairs = {(a, a) for a, count in makeup.parts if count > 1} | set(pairwise(shapes))
        found = np.zeros_like(weights)
        for one, other in pairs:
            curve = self.link(self.place(Shape(one.pool, 1)), self.place(Shape(other.pool, 1)))
            found = np.maximum(found, math.inf if curve is None else all_reduce_s(weights, replicas, curve))
        return found

    def least_share(self, makeup: Makeup) -> int:
        """Over how many devices at least the weights of a stage are spread, as far as the rules count it."""
        return min(4, *(shape.tp for shape in makeup.shapes), 4)

    def place(self, shape: Shape) -> Place:
        """The devices of one host that serve a replica."""
        pool = self.pools[shape.pool]
        return Place(pool.zone, pool.kind, min(shape.tp, self.per_host[shape.pool]))

    def link(self, one: Place, other: Place) -> Curve | None:
        """None if they are not connected."""
        try:
            return self.cluster.links.curve(one, other)
        except PlanError:
            return None


def all_reduce_s(size: Floats, members: int, curve: Curve) -> Floats:
    """A ring: 2 (n - 1) messages of an n-th, one bucket after the other."""
    if members < 2:
        return np.zeros_like(size)
    buckets, rest = np.divmod(size, BUCKET_BYTES)
    whole, part = curve.seconds(BUCKET_BYTES / members), curve.seconds(rest / members)
    return 2 * (members - 1) * (buckets * whole + part)
