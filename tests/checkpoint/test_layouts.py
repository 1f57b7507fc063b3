"""Runs a part of `layouts.py`, in which every layout writes once and reads once: jobs that resume from slices on another layout."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import elastic
from elastic.checkpoint.commit import save
from elastic.checkpoint.convert.run import Conversion, plan
from elastic.checkpoint.directory import newest
from elastic.checkpoint.reader import ElasticSource
from elastic.checkpoint.store import LocalStore
from elastic.checkpoint.writer import TensorRun
from tests.checkpoint import layouts
from tests.checkpoint.layouts import LAYOUTS, RULES, SLICES

pytestmark = pytest.mark.slow


@pytest.mark.long
def test_a_chain_through_all_layouts_and_slices_is_one_run(tmp_path: Path) -> None:
    """Each job takes one step from where the one before stopped; what it saved is sliced for the next."""
    links = [(*pair, SLICES[(i + i // 3) % 3]) for i, pair in enumerate(pairwise([*LAYOUTS, LAYOUTS[0]]))]
    assert {writer for writer, _, _ in links} == {reader for _, reader, _ in links} == set(LAYOUTS)
    every = {(slices, stages) for slices in SLICES for stages in (1, 2, 3)}
    assert {(slices, writer.stages) for writer, _, slices in links} == {(slices, reader.stages) for _, reader, slices in links} == every
    whole = layouts.whole(tmp_path / "whole", len(links) + 1)
    assert len(set(whole.digests)) == len(whole.digests), "nothing was trained"
    folder = tmp_path / "0"
    assert layouts.faults(LAYOUTS[0], folder, 1, 5, whole, 0) == []
    for step, (writer, reader, slices) in enumerate(links, 1):
        folder = layouts.sliced(folder, tmp_path / str(step), slices)
        assert layouts.faults(reader, folder, step + 1, 5 + step, whole, step) == [], f"{writer} x {slices} -> {reader}"


@pytest.mark.long
def test_another_value_in_a_slice_would_be_noticed(tmp_path: Path) -> None:
    """The sign of one number of the optimizer's state, in a checkpoint that is good in itself: a converter's mistake would be such."""
    whole = layouts.whole(tmp_path / "whole", 3)
    wrote = tmp_path / "wrote"
    assert layouts.faults(LAYOUTS[0], wrote, 2, 5, whole, 0) == []
    right = layouts.sliced(wrote, tmp_path / "right", 2)
    wrong = tmp_path / "wrong"
    source = newest(LocalStore(right))
    assert source is not None
    _save_with_one_bit_changed(source, wrong)
    assert layouts.faults(LAYOUTS[1], right, 3, 9, whole, 2) == []
    assert layouts.faults(LAYOUTS[1], wrong, 3, 9, whole, 2) == ["parameters", "what was saved"]


def _save_with_one_bit_changed(source: ElasticSource, target: Path) -> None:
    def runs() -> Iterator[TensorRun]:
        for (name, state), place in source.manifest.places.items():
            values = source.read(name, state, 0, place.spec.elements)
            if (name, state) == ("1.qkv.weight", "exp_avg"):
                values[-1] *= -1
            yield name, state, 0, values

    save(LocalStore(target), source.contents, runs(), step=2, slicings=source.slicings)


def test_the_model_has_what_slices_have_to_carry(tmp_path: Path) -> None:
    layouts.whole(tmp_path, 1)
    source = newest(LocalStore(tmp_path))
    assert source is not None
    contents = source.contents
    assert "0.position" in contents.frozen
    assert "0.scale" in contents.buffers
    assert "3.weight" not in contents.tensors, "tied"
    assert {spec.dtype for spec in contents.tensors["2.qkv.weight"].values()} == {"bfloat16"}
    assert contents.extra["elastic"]["scheduler"] is not None
    for slices in (2, 4):
        slicings = plan(
            Conversion(source=tmp_path, target=tmp_path / "x", to="elastic", rules=RULES[slices], tensor_parallel=slices)
        ).slicings
        assert slicings["0.weight", "exp_avg"].padded is not None
        assert len({slicing.ranks for slicing in slicings.values()}) == 1
        assert {"0.weight", "1.qkv.bias", "2.up.weight", "2.down.weight"} <= {name for name, _ in slicings}


@pytest.mark.long
@pytest.mark.usefixtures("leftovers")
def test_a_job_with_its_agent_goes_on_from_slices(tmp_path: Path) -> None:
    def run(folder: Path, seed: int, every: int | None, **layout: int) -> Any:
        return elastic.run(layouts.train, args=[str(folder), 4, seed, every], rebalance=False, **layout).value

    before = run(tmp_path / "a", 5, 2, workers=2, stages=2)
    layouts.sliced(tmp_path / "a" / "step-00000002", tmp_path / "b", 2)
    source = newest(LocalStore(tmp_path / "b"))
    assert source is not None
    assert source.slicings
    source.close()
    after = run(tmp_path / "b", 9, None, workers=3, stages=1)
    assert after["lines"] == before["lines"][2:]
    assert after["digests"] == before["digests"][2:]
    assert layouts.saved(tmp_path / "b", 4) == layouts.saved(tmp_path / "a", 4)
