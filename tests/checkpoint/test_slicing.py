"""Tests the arithmetic of slices: the place of each element of a run, padding, and round trips."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.checkpoint import sliced
from elastic.checkpoint.plan import Sliced, plan_files
from elastic.checkpoint.slices import Slicing
from elastic.checkpoint.state import PARAM
from tests.checkpoint.sliced_samples import DTYPES, any_bits, bits, contents_of, reference, shapes, slicings


@given(shapes, st.data())
def test_patches_are_the_run_and_its_places_in_slices(shape: tuple[int, ...], data: st.DataObject) -> None:
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, math.prod(shape))] * 2)))
    check_patches(shape, data.draw(slicings(shape)), start, stop, data.draw(st.integers(1, 40)))


def test_patches_of_every_run_of_a_fused_and_padded_tensor() -> None:
    slicing = Slicing(dim=1, widths=((2, 1), (1, 1)), padded=(4, 3))
    for start, stop in combinations(range(41), 2):
        check_patches((4, 5, 2), slicing, start, stop, 7 + start % 14)


def check_patches(shape: tuple[int, ...], slicing: Slicing, start: int, stop: int, most: int) -> None:
    whole = torch.arange(math.prod(shape)).reshape(shape)
    slices = [reference(whole, slicing, rank) for rank in range(slicing.ranks)]
    assert [slicing.shape(shape, rank) for rank in range(slicing.ranks)] == [tuple(each.shape) for each in slices]
    parts, found = [each.reshape(-1).tolist() for each in slices], []
    for patch in slicing.patches(shape, start, stop):
        divided = list(patch.divided(most))
        assert sum(each.rows for each in divided) == patch.rows
        for each in divided:
            for row in range(each.rows):
                there = [first + row * each.pitch + i for first, count in each.pieces for i in range(count)]
                at = each.at + row * each.stride
                assert parts[each.rank][at : at + each.width] == there
                found += there
    assert sorted(found) == list(range(start, stop))


@given(shapes, st.data())
def test_padding_is_what_no_element_lies_in(shape: tuple[int, ...], data: st.DataObject) -> None:
    slicing = data.draw(slicings(shape))
    ones = torch.ones(shape, dtype=torch.int64)
    for rank in range(slicing.ranks):
        free = {i for run in slicing.padding(shape, rank) for i in range(*run)}
        assert free == set((reference(ones, slicing, rank).reshape(-1) == 0).nonzero().reshape(-1).tolist())


@given(st.data())
@settings(max_examples=80)
def test_any_run_goes_into_slices_and_comes_back(data: st.DataObject) -> None:
    """In memory; also with copies in pieces, and with padding wide next to a block. Elements that nothing writes are the padding."""
    shape, dtype = data.draw(shapes), data.draw(st.sampled_from(DTYPES))
    values = {("t", PARAM): any_bits(shape, dtype, 1)}
    plan = plan_files(contents_of(values), 1 << 30, {("t", PARAM): data.draw(slicings(shape))})
    place, flat = plan.places["t", PARAM], values["t", PARAM].reshape(-1)
    assert isinstance(place, Sliced)
    files = {file.name: np.frombuffer(file.head.ljust(file.size, b"\0"), dtype=np.uint8).copy() for file in plan.files}
    touched = {file.name: {i for run in ((0, len(file.head)), *file.zeros) for i in range(*run)} for file in plan.files}
    runs = sorted(data.draw(st.tuples(*[st.integers(0, flat.numel())] * 3)))

    def fill(file: str, memory: np.ndarray, offset: int) -> None:
        memory[:] = files[file][offset : offset + memory.size]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sliced, "_MOST_BYTES", data.draw(st.integers(1, 200)))
        patch.setattr(sliced, "BLOCK_BYTES", data.draw(st.sampled_from([1, 16, 1 << 18])))
        for start, stop in pairwise([0, *runs, flat.numel()]):
            for file, offset, memory in sliced.scatter(place, start, flat[start:stop]):
                assert not touched[file] & set(range(offset, offset + memory.size)), "written twice"
                touched[file] |= set(range(offset, offset + memory.size))
                files[file][offset : offset + memory.size] = memory
        assert touched == {file.name: set(range(file.size)) for file in plan.files}
        found = torch.empty(runs[2] - runs[0], dtype=dtype)
        sliced.gather(place, runs[0], found, fill)
    assert bits(found) == bits(flat[runs[0] : runs[2]])
