"""Tests runs and boxes against brute force."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic.checkpoint.convert.rule_source import JoinedTensor, Part
from elastic.checkpoint.state import Spec
from elastic.checkpoint.stored import Chunked, Files, Strided
from elastic.layout.boxes import boxes_of_run, intersection, runs_of_box, tiling_fault

shapes = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


@given(shapes, st.data())
def test_boxes_of_a_run_are_its_elements_in_order(shape, data):
    count = math.prod(shape)
    start, stop = sorted((data.draw(st.integers(0, count)), data.draw(st.integers(0, count))))
    values = np.arange(count).reshape(shape)
    found = []
    boxes = list(boxes_of_run(shape, start, stop))
    for offsets, sizes in boxes:
        found += values[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].reshape(-1).tolist()
    assert found == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@given(shapes.filter(len), st.data())
def test_runs_of_a_box_are_its_elements_in_order(shape, data):
    offsets = tuple(data.draw(st.integers(0, extent - 1)) for extent in shape)
    sizes = tuple(data.draw(st.integers(1, extent - offset)) for extent, offset in zip(shape, offsets, strict=True))
    values = np.arange(math.prod(shape)).reshape(shape)
    expected = values[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].reshape(-1).tolist()
    assert [at for run in runs_of_box(shape, (offsets, sizes)) for at in range(*run)] == expected


@given(st.integers(1, 5), st.integers(1, 5), st.permutations(range(3)), st.data())
def test_chunks_of_any_stride_order_are_read_by_runs(tmp_path_factory, rows, columns, order, data):
    shape = (rows, columns, 3)
    whole = torch.arange(math.prod(shape), dtype=torch.int32).reshape(shape)
    path = tmp_path_factory.getbasetemp() / "chunks"
    cuts = [sorted({0, *data.draw(st.lists(st.integers(1, extent), max_size=2)), extent}) for extent in shape]
    files, chunks, memory = Files(), [], b""
    for index in np.ndindex(*(len(cut) - 1 for cut in cuts)):
        offsets = tuple(cut[i] for cut, i in zip(cuts, index, strict=True))
        sizes = tuple(cut[i + 1] - cut[i] for cut, i in zip(cuts, index, strict=True))
        part = whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
        dense = part.permute(order).contiguous().permute([list(order).index(dim) for dim in range(3)])
        spec = Spec(shape=sizes, dtype="int32")
        stored = Strided(files=files, path=path, offset=len(memory), spec=spec, strides=dense.stride())
        memory += dense.permute(order).contiguous().numpy().tobytes()
        chunks.append((offsets, sizes, lambda stored=stored: stored))
    path.write_bytes(memory)
    assert tiling_fault(shape, [chunk[:2] for chunk in chunks]) is None
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, whole.numel())] * 2)))
    tensor = Chunked(spec=Spec(shape=shape, dtype="int32"), chunks=tuple(chunks))
    assert tensor.run(start, stop).tolist() == list(range(start, stop))
    files.close()


@given(shapes.filter(len), st.data())
def test_slabs_that_are_split_off_and_joined_are_the_tensor(shape, data):
    dim = data.draw(st.integers(0, len(shape) - 1))
    cuts = sorted({0, *data.draw(st.lists(st.integers(0, shape[dim]), max_size=3)), shape[dim]})
    values = np.arange(math.prod(shape)).reshape(shape)
    parts = [Part(of="t", shape=shape, dim=dim, low=low, width=high - low) for low, high in pairwise(cuts)]
    joined = JoinedTensor(spec=Spec(shape=shape, dtype="int64"), dim=dim, parts=tuple(parts))
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, values.size)] * 2)))
    assert [at for _, low, high in joined.pieces(start, stop) for at in range(low, high)] == list(range(start, stop))
    for part in parts:
        expected = values.take(range(part.low, part.low + part.width), axis=dim).reshape(-1).tolist()
        assert [at for _, low, high in part.pieces(0, len(expected)) for at in range(low, high)] == expected


@pytest.mark.parametrize(
    ("boxes", "reason"),
    [
        ([((0, 0), (2, 3)), ((2, 0), (1, 3))], "9 of 12"),
        ([((0, 0), (2, 3)), ((1, 0), (2, 3))], "overlap"),
        ([((0, 0), (5, 3))], "exceeds the shape"),
        ([((0,), (12,))], "another number of dimensions"),
    ],
)
def test_what_does_not_tile_is_refused(boxes, reason):
    fault = tiling_fault((4, 3), boxes)
    assert fault is not None
    assert reason in fault


# ((4, 3), boxes)


def test_boxes_apart_share_nothing():
    assert intersection(((0, 0), (2, 2)), ((2, 0), (1, 2))) is None
    assert intersection(((0, 0), (2, 2)), ((1, 1), (4, 4))) == ((1, 1), (1, 1))
