"""The reference cost rules for comparisons on the published Sailor data: see "Reference cost rules" in the description of the data.

They serve as a common measure; `elastic.plan.division.physical` predicts the measurements better.
"""

from __future__ import annotations

import math

import numpy as np

from elastic.plan.cluster import Cluster, LinkEnd
from elastic.plan.division.physical import BASE_BYTES, COMMUNICATOR_BYTES, STATE_PER_PARAMETER_BYTE, PhysicalRules
from elastic.plan.division.rules import Bytes, Floats, Transfers, spans
from elastic.plan.division.shapes import Makeup, Shape
from elastic.plan.profiles import Profiles


class ReferenceRules(PhysicalRules):
    """The reference rules, for a cluster and profiles. Raises PlanError if a kind of the cluster has no profile."""

    transfers = Transfers(first=(1.0, 1.0, 1.0, 2.0), middle=1.0, last=2.0)

    def __init__(self, cluster: Cluster, profiles: Profiles) -> None:
        super().__init__(cluster, profiles)
        self.profiles = profiles  # as measured
        self.per_host = [max(host.count for host in cluster.hosts if (host.kind, host.zone) == pool[:2]) for pool in self.pools]

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
        return self._moved_s(sender, receiver, [0.0, *(layer.output * size for layer in sent[:-1]), 0.0])

    def backward_s(self, sender: Shape, receiver: Shape, size: int) -> Floats:
        """Returns the seconds to send gradients, which the rules take to be as large as the output of the stage's first layer."""
        sent = self.profiles.bytes[1]
        return self._moved_s(sender, receiver, [0.0, *(layer.output * size for layer in sent[1:]), 0.0])

    def _moved_s(self, sender: Shape, receiver: Shape, sizes: list[float]) -> Floats:
        """Returns seconds of messages over the link between all devices of two replicas."""
        curve = self.link(self._devices(sender), self._devices(receiver))
        return np.full(len(sizes), math.inf) if curve is None else curve.seconds(sizes)

    def _devices(self, shape: Shape) -> LinkEnd:
        return self.place(shape)._replace(devices=min(shape.tp, self.per_host[shape.pool]))

    def least_share(self, makeup: Makeup) -> int:
        """Returns the number of devices that share the weights, at most 4."""
        return min(4, super().least_share(makeup))
