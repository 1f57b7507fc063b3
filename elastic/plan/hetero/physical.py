"""A cost model that is nearer to what was measured than the reference rules; nothing in it is fitted to measured runs.

It differs from the reference rules in what is known of how such programs work:

- A transfer between stages occupies both ends, as blocking point-to-point calls do: a stage in the middle is charged for receiving and
  sending in both directions, not only for sending.
- With tensor parallelism every device sends the whole activations, which are replicated, over its own network interface: the link is that
  of one device, not of all.
- More samples are never less work: a layer that was profiled slower for a smaller micro-batch was measured with noise.
- In memory there are, besides, the gradients of the one layer that is running backwards, about as large as its activations; the
  bucket into which gradients are flattened; a message in each direction at each boundary; and what a communicator costs (the rules charge
  it with tensor parallelism) also with data parallelism and between stages.

The update stays that of one layer: profiles give all layers of a model the same, whatever their parameters, so it is not a layer's.
"""

from __future__ import annotations

import numpy as np

from elastic.plan.cluster import Cluster
from elastic.plan.hetero.reference import BASE_BYTES, BUCKET_BYTES, COMMUNICATOR_BYTES, STATE_PER_PARAMETER_BYTE, ReferenceRules
from elastic.plan.hetero.rules import Bytes, Floats, Transfers, spans
from elastic.plan.hetero.shapes import Makeup, Shape
from elastic.plan.profiles import Profiles


class PhysicalRules(ReferenceRules):
    """See above."""

    transfers = Transfers(first=(2.0,), middle=2.0, last=2.0)

    def __init__(self, cluster: Cluster, profiles: Profiles) -> None:
        super().__init__(cluster, profiles.without_noise())

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
        return super().forward_s(_one(sender), _one(receiver), size)

    def backward_s(self, sender: Shape, receiver: Shape, size: int) -> Floats:
        """As large as the activations that came over the same boundary."""
        return self.forward_s(receiver, sender, size)

    def least_share(self, makeup: Makeup) -> int:
        return min(shape.tp for shape in makeup.shapes)


def _one(shape: Shape) -> Shape:
    return Shape(shape.pool, 1)


def _largest(per_layer: list[float]) -> Floats:
    """The largest value over `[first, behind)`; 0 where that is empty."""
    values = np.array(per_layer)
    found = np.zeros((len(values) + 1, len(values) + 1))
    for first in range(len(values)):
        found[first, first + 1 :] = np.maximum.accumulate(values[first:])
    return found
