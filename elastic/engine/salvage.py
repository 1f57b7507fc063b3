"""The results of an aborted step that need not be computed again: the grains that a worker has finished.

A stage has finished a grain when it has run the backward of all the grain's micro-batches. The grain's gradients are then in sums, and the
last stage has its losses. A grain is not computed again if, at every stage, a worker has its sums and the next view routes the grain to
the same worker. Of other grains, a worker computes again only what it does not hold (`in_flight`); messages are sent again. Bits do not
change: computing anything again would give the same bits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from elastic.engine.in_flight import InFlight
from elastic.engine.reduction import Parts
from elastic.engine.stage import LossLeaf
from elastic.engine.statistics import Records
from elastic.plan.routing import Node


@dataclass(frozen=True, slots=True, kw_only=True)
class Salvage:
    """One worker's results of step `step` for `layers`: gradient sums by vector id, and losses.

    `grains` are the finished grains. `summed` are all grains that some sum covers; a sum can be kept only if the next view routes all
    grains it covers to this worker. `in_flight` has what this worker holds of micro-batches, of the `begun` grains
    and of finished ones; the parameters of each layer lie at `addresses`.
    """

    step: int
    layers: range
    grains: frozenset[int]
    summed: frozenset[int]
    sums: Mapping[int, Mapping[Node, Parts]]
    leaves: tuple[LossLeaf, ...]
    records: Records = field(default_factory=dict)
    begun: frozenset[int] = frozenset()
    in_flight: Mapping[int, InFlight] = field(default_factory=dict)
    addresses: Mapping[int, Sequence[int]] = field(default_factory=dict)

    @property
    def without_sums(self) -> Salvage:
        """What is left if the sums cannot be kept."""
        return replace(self, grains=frozenset(), summed=frozenset(), sums={}, leaves=())


def joined(one: Salvage | None, others: Sequence[Salvage]) -> Salvage | None:
    """Returns the parts of one step together: a worker's own and those it takes over; they are of different grains."""
    parts = [part for part in (one, *others) if part is not None]
    if not parts:
        return None
    sums: dict[int, dict[Node, Parts]] = {}
    for part in parts:
        for number, nodes in part.sums.items():
            sums.setdefault(number, {}).update(nodes)
    return Salvage(
        step=parts[0].step,
        layers=range(max(part.layers.start for part in parts), min(part.layers.stop for part in parts)),
        grains=frozenset[int]().union(*(part.grains for part in parts)),
        summed=frozenset[int]().union(*(part.summed for part in parts)),
        sums=sums,
        leaves=tuple(leaf for part in parts for leaf in part.leaves),
        records={key: value for part in parts for key, value in part.records.items()},
        in_flight={} if one is None else one.in_flight,
        addresses={} if one is None else one.addresses,
    )


def kept(salvage: Salvage, routed: Mapping[int, Collection[int]], *, last: bool) -> Salvage:
    """Returns the part of the salvage that a worker keeps in the next view.

    `routed` maps its grains to their micro-batches; `last` is true on the last stage. Each loss must be counted once. So a worker that has
    left the last stage drops its losses, which the new last stage computes again; and a worker on the last stage keeps only the losses of
    grains routed to it (`summed` does not ensure that: without a gradient at a stage it is empty).
    """
    grains = salvage.grains.intersection(routed)
    wanted = {micro_batch for grain in grains for micro_batch in routed[grain]} if last else set()
    return replace(salvage, grains=grains, leaves=tuple(leaf for leaf in salvage.leaves if leaf.micro_batch in wanted))


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """How a view starts step `step`: every stage has finished `grains`; `salvage` is what this worker keeps of the step.

    `own` are the grains that this worker was to compute in the view before; others are taken over from workers that were lost.
    """

    step: int
    grains: frozenset[int]
    salvage: Salvage | None
    own: frozenset[int] = frozenset()
