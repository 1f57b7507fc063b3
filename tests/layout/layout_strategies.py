"""Random models, stages and layouts, and an oracle of transfers that works unit by unit (a unit is 64 elements)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st

from elastic.layout.layout import Layout, spread
from elastic.layout.regions import LayerSpec, ModelSpec, Tie
from elastic.layout.transfer import Holding

UNIT = 64
STATES = ("param", "exp_avg", "exp_avg_sq")
few = settings(max_examples=100, deadline=None)

Stages = list[tuple[range, tuple[int, ...]]]
Held = dict[tuple[int, str, int], set[int]]
"""(worker, state, layer) -> units."""

shapes = st.sampled_from([(), (1,), (0, 7), (63,), (64,), (65,), (5, 31), (4096,), (4097,), (64, 70), (3, 4096)])
dtypes = st.sampled_from(["float32", "bfloat16", "float64"])


@st.composite
def models(draw, most_layers: int = 5, cuts: Sequence[str] = ("block", "tensor")) -> ModelSpec:
    layers: list[LayerSpec] = []
    for index in range(draw(st.integers(1, most_layers))):
        drawn = draw(st.lists(st.tuples(shapes, dtypes), max_size=4))
        known = [Tie(name=p.name, home=layer.index) for layer in layers for p in layer.parameters]
        ties = draw(st.lists(st.sampled_from(known), max_size=2, unique=True)) if known else []
        layers.append(LayerSpec.build(index, [(f"layers.{index}.p{i}", shape, dtype) for i, (shape, dtype) in enumerate(drawn)], ties))
    parts = draw(_parts(len(layers)))
    for layer in layers:
        known = [Tie(name=p.name, home=part.index) for part in parts if part.module < layer.index for p in part.parameters]
        ties = draw(st.lists(st.sampled_from(known), max_size=2, unique=True)) if known else []
        layers[layer.index] = replace(layer, ties=(*layer.ties, *ties))
    return ModelSpec(layers=(*layers, *parts), cut=draw(st.sampled_from(cuts)))


@st.composite
def _parts(draw, depth: int) -> list[LayerSpec]:
    """More vectors of modules, trained or frozen."""
    found: list[LayerSpec] = []
    for index in range(depth, depth + draw(st.integers(0, 3))):
        drawn = draw(st.lists(st.tuples(shapes, st.sampled_from(["uint8", "float16"])), min_size=1, max_size=3))
        named = [(f"layers.{index}.p{i}", shape, dtype) for i, (shape, dtype) in enumerate(drawn)]
        found.append(LayerSpec.build(index, named, (), draw(st.integers(0, depth - 1)), draw(st.booleans())))
    return found


@st.composite
def stages_for(draw, model: ModelSpec, workers: Sequence[int]) -> Stages:
    """Any split of the layers and of the workers, in the given order, into the same number of non-empty runs."""
    layers = model.depth
    count = draw(st.integers(1, min(layers, len(workers))))
    layer_cuts = [0, *draw(_cuts(layers, count)), layers]
    worker_cuts = [0, *draw(_cuts(len(workers), count)), len(workers)]
    return [(range(layer_cuts[i], layer_cuts[i + 1]), tuple(workers[worker_cuts[i] : worker_cuts[i + 1]])) for i in range(count)]


def _cuts(length: int, parts: int) -> st.SearchStrategy[list[int]]:
    if parts == 1:
        return st.just([])
    return st.lists(st.integers(1, length - 1), min_size=parts - 1, max_size=parts - 1, unique=True).map(sorted)


@st.composite
def host_maps(draw, workers: Sequence[int]) -> dict[int, str] | None:
    names = draw(st.lists(st.sampled_from("abc"), min_size=len(workers), max_size=len(workers)))
    return draw(st.sampled_from([None, dict(zip(workers, names, strict=True))]))


worker_lists = st.lists(st.integers(0, 50), min_size=1, max_size=6, unique=True)


@st.composite
def layouts(draw, model: ModelSpec | None = None, workers: Sequence[int] | None = None) -> Layout:
    model = draw(models()) if model is None else model
    workers = draw(worker_lists) if workers is None else workers
    return spread(model, draw(stages_for(model, workers)), draw(host_maps(workers)))


def units(start: int, stop: int) -> set[int]:
    assert start % UNIT == stop % UNIT == 0, (start, stop)
    return set(range(start // UNIT, stop // UNIT))


def held(holdings: Iterable[Holding]) -> Held:
    found: Held = {}
    for h in holdings:
        found.setdefault((h.worker, h.state, h.layer), set()).update(units(h.start, h.stop))
    return found


def wanted(layout: Layout, states: Sequence[str]) -> Held:
    """Returns what a layout needs, from the definition and not from `needs`."""
    found: Held = {}

    def want(worker: int | None, state: str, layer: int, wanted_units: set[int]) -> None:
        if worker is not None and wanted_units:
            found.setdefault((worker, state, layer), set()).update(wanted_units)

    for layer, spec in enumerate(layout.model.layers):
        here = layout.layers[layer]
        for state in states if not spec.frozen else {"param"}.intersection(states):
            for interval in here.intervals:
                run = units(interval.start, interval.stop)
                if state != "param":
                    want(interval.owner, state, layer, run)
                for holder in interval.replicas:
                    want(holder, state, layer, run)
            if state == "param":
                for worker in here.members:
                    want(worker, state, layer, units(0, spec.size))
                for tie in spec.ties:
                    home = next(p for p in layout.model.layers[tie.home].parameters if p.name == tie.name)
                    tied = set(range(home.start // UNIT, -(-(home.start + home.size) // UNIT)))
                    for worker in here.members:
                        want(worker, state, tie.home, tied)
    return found


def fewest_elements(have: Held, want: Held) -> int:
    """Returns the fewest elements to send: every unit that a worker needs and does not have must be sent to it once."""
    return sum(UNIT * len(run - have.get(key, set())) for key, run in want.items())
