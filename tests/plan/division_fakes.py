"""A small cost model with random numbers, and the best plan by exhaustive search."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
from hypothesis import strategies as st

from elastic.plan.division.costs import costs
from elastic.plan.division.division import Section
from elastic.plan.division.rules import Bytes, Floats, Transfers, spans
from elastic.plan.division.shapes import Makeup, Pool, Shape, alike

SIZES = (1, 2)
DEGREES = (1, 2)


@dataclass(frozen=True)
class FakeRules:
    """Random seconds and bytes; more devices per replica make layers faster and smaller, larger micro-batches slower and larger."""

    pools: tuple[Pool, ...]
    layer_s: tuple[tuple[float, ...], ...]
    """By pool and layer."""
    parameters: tuple[float, ...]
    activations: tuple[float, ...]
    capacity: tuple[float, ...]
    transfer_s: tuple[float, ...]
    """By boundary before each layer; the slower, the more the two pools differ."""
    transfers: Transfers
    sync_s_per_parameter: float

    @property
    def layers(self) -> int:
        return len(self.parameters)

    def micro_batch_sizes(self) -> tuple[int, ...]:
        return SIZES

    def shapes(self, size: int) -> tuple[Shape, ...]:
        return tuple(Shape(pool, tp) for pool in range(len(self.pools)) for tp in DEGREES if size < 2 or tp == 1 or pool == 0)

    def seconds(self, shape: Shape, size: int) -> Floats:
        return np.array(self.layer_s[shape.pool]) * size / shape.tp**0.75

    def update_s(self, shape: Shape, size: int) -> Floats:
        return spans(np.array(self.parameters)) / 64 / shape.tp

    def footprint(self, shape: Shape, size: int, shared: bool) -> Bytes:
        return Bytes(
            fixed=spans(np.array(self.parameters)) / shape.tp + shared,
            in_flight=size * spans(np.array(self.activations)) / shape.tp,
            capacity=self.capacity[shape.pool],
        )

    def forward_s(self, sender: Shape, receiver: Shape, size: int) -> Floats:
        slower = 1 + abs(sender.pool - receiver.pool) + 0.5 * sender.pool
        return size * slower * np.array([*self.transfer_s, 0.0]) / min(sender.tp, receiver.tp)

    def backward_s(self, sender: Shape, receiver: Shape, size: int) -> Floats:
        return 1.5 * self.forward_s(receiver, sender, size)

    def sync_s(self, makeup: Makeup) -> Floats:
        share = self.sync_s_per_parameter * (makeup.replicas - 1) / makeup.replicas
        return spans(np.array(self.parameters)).clip(0) * share / min(shape.tp for shape in makeup.shapes)


@st.composite
def fake_rules(draw: st.DrawFn, most_layers: int = 4) -> FakeRules:
    eighths = st.integers(1, 40).map(lambda eighth: eighth / 8)
    layers = draw(st.integers(1, most_layers))
    pools = draw(st.integers(1, 2))

    def each(of: st.SearchStrategy[float], count: int = layers) -> tuple[float, ...]:
        return tuple(draw(st.lists(of, min_size=count, max_size=count)))

    return FakeRules(
        pools=tuple(Pool(f"kind{number}", "here", draw(st.integers(1, 4))) for number in range(pools)),
        layer_s=tuple(each(eighths) for _ in range(pools)),
        parameters=each(eighths),
        activations=each(eighths),
        capacity=each(st.integers(4, 40).map(float), pools),
        transfer_s=each(st.integers(0, 8).map(lambda eighth: eighth / 8)),
        transfers=draw(
            st.sampled_from([Transfers(first=(1.0, 1.0, 1.0, 2.0), middle=1.0, last=2.0), Transfers(first=(2.0,), middle=2.0, last=2.0)])
        ),
        sync_s_per_parameter=draw(st.sampled_from([0.0, 0.25, 2.0])),
    )


def all_plans(rules: FakeRules, replicas: int, size: int) -> Iterator[tuple[Section, ...]]:
    """Every way to cut the layers into stages of so many replicas of one shape each, within the devices."""
    for depth in range(1, rules.layers + 1):
        for inner in combinations(range(1, rules.layers), depth - 1):
            cuts = [0, *inner, rules.layers]
            for shapes in product(rules.shapes(size), repeat=depth):
                stages = tuple(
                    Section(layers=range(start, stop), makeup=alike(shape, replicas))
                    for start, stop, shape in zip(cuts, cuts[1:], shapes, strict=False)
                )
                if within(rules, stages):
                    yield stages


def within(rules: FakeRules, stages: tuple[Section, ...]) -> bool:
    """Whether there are enough devices."""
    return all(sum(stage.makeup.devices(number) for stage in stages) <= pool.count for number, pool in enumerate(rules.pools))


def best_step_s(rules: FakeRules, batch: int) -> float | None:
    """The least step time of all plans that fit into memory, or None."""
    found = []
    for size in SIZES:
        for replicas in range(1, sum(pool.count for pool in rules.pools) + 1):
            micro_batches = -(-batch // (size * replicas))
            for stages in all_plans(rules, replicas, size):
                # The search assumes one micro-batch in flight per later stage, even if there are fewer.
                if costs(rules, stages, size, len(stages)).fits:
                    found.append(costs(rules, stages, size, micro_batches).step_s)
    return min(found, default=None)
