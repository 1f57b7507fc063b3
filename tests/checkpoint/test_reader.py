"""Tests that any requested run equals the slice of the saved tensor, and that little else is read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.checkpoint.blocks import BLOCK_BYTES
from elastic.checkpoint.commit import save
from elastic.checkpoint.directory import newest
from elastic.checkpoint.reader import ElasticSource
from elastic.checkpoint.slices import Slice, fused_slice, read_slice, slice_runs
from elastic.checkpoint.state import PARAM
from elastic.checkpoint.store import LocalStore
from elastic.errors import CheckpointError
from tests.checkpoint.format_samples import contents_of, values_at, whole_runs

VALUES = values_at(7, {"a": (1200, 1001), "b": (65,), "qkv": (24, 6), "d": (0, 4), "e": ()})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ElasticSource]:
    store = LocalStore(tmp_path_factory.mktemp("reader"))
    save(store, contents_of(VALUES), whole_runs(VALUES), step=7, max_file_bytes=5_000_000)
    found = newest(store)
    assert found is not None
    yield found
    found.close()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_runs_equal_slices(source: ElasticSource, data: st.DataObject) -> None:
    name, state = data.draw(st.sampled_from(sorted(VALUES)))
    flat = VALUES[name, state].reshape(-1)
    start = data.draw(st.integers(0, flat.numel()))
    stop = data.draw(st.integers(start, flat.numel()))
    found = source.read(name, state, start, stop)
    assert found.dtype == flat.dtype
    assert torch.equal(found, flat[start:stop])


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_runs_are_read_to_where_they_are_wanted(source: ElasticSource, data: st.DataObject) -> None:
    name, state = data.draw(st.sampled_from(sorted(VALUES)))
    flat = VALUES[name, state].reshape(-1)
    start = data.draw(st.integers(0, flat.numel()))
    stop = data.draw(st.integers(start, flat.numel()))
    around = torch.zeros(stop - start + 2, dtype=flat.dtype)
    source.read_into(name, state, start, around[1:-1])
    assert torch.equal(around[1:-1], flat[start:stop])
    assert not around[[0, -1]].any()


def test_memory_of_another_kind_is_refused(source: ElasticSource) -> None:
    for values in (torch.zeros(4, dtype=torch.float64), torch.zeros(8)[::2]):
        with pytest.raises(CheckpointError, match="'b', 'param' is float32; it cannot be read into"):
            source.read_into("b", PARAM, 0, values)


def test_a_tied_name_reads_its_base(source: ElasticSource) -> None:
    assert torch.equal(source.read("lm_head.weight", PARAM, 5, 9), VALUES["a", PARAM].reshape(-1)[5:9])


@pytest.mark.parametrize("run", [(-1, 3), (3, 2), (0, 66)])
def test_runs_outside_are_refused(source: ElasticSource, run: tuple[int, int]) -> None:
    with pytest.raises(CheckpointError, match=r"'b', 'param': run \[.* of 65 elements"):
        source.read("b", PARAM, *run)


def test_what_is_not_there_is_named(source: ElasticSource) -> None:
    with pytest.raises(CheckpointError, match="it has no 'exp_avg' of 'x'"):
        source.read("x", "exp_avg", 0, 1)


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 6])
def test_a_worker_reads_little_more_than_its_own(source: ElasticSource, workers: int) -> None:
    size = VALUES["a", PARAM].numel()
    for worker in range(workers):
        before = source.bytes_read
        start, stop = (size * place // workers // 4096 * 4096 for place in (worker, worker + 1))
        source.read("a", PARAM, start, stop)
        assert source.bytes_read - before < (stop - start) * 4 + 2 * BLOCK_BYTES


def test_small_runs_in_order_read_each_block_once(tmp_path: Path) -> None:
    values = values_at(7, {"a": (300, 1001)})
    store = LocalStore(tmp_path)
    save(store, contents_of(values), whole_runs(values), step=7)
    found = newest(store)
    assert found is not None
    for start in range(0, 300 * 1001, 1001):
        found.read("a", PARAM, start, start + 1001)
    place = found.manifest.files[found.place("a").file]
    assert found.bytes_read <= place.size
    found.close()


shapes = st.lists(st.integers(0, 5), min_size=1, max_size=4)


@given(shapes, st.data())
def test_runs_of_a_box_are_its_elements(shape: list[int], data: st.DataObject) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    start = data.draw(st.integers(0, shape[dim]))
    stop = data.draw(st.integers(start, shape[dim]))
    everything = torch.arange(math.prod(shape)).reshape(shape)
    wanted = everything.narrow(dim, start, stop - start).reshape(-1).tolist()
    runs = list(slice_runs(shape, dim, start, stop))
    assert [index for run in runs for index in range(*run)] == wanted
    assert all(before[1] < after[0] for before, after in pairwise(runs))


@pytest.mark.parametrize(("dim", "widths"), [(0, (10, 0, 14)), (1, (1, 5)), (1, (2, 2, 2)), (0, (24,))])
def test_uneven_slices_together_are_the_tensor(source: ElasticSource, dim: int, widths: tuple[int, ...]) -> None:
    parts, position = [], 0
    for width in widths:
        parts.append(read_slice(source, "qkv", "exp_avg", Slice(dim=dim, cuts=((position, position + width),))))
        position += width
    assert torch.equal(torch.cat(parts, dim), VALUES["qkv", "exp_avg"])


def test_fused_query_key_value_with_fewer_key_heads(source: ElasticSource) -> None:
    """16 rows of queries, 4 of keys, 4 of values; two workers, of which the first has more."""
    q, k, v = VALUES["qkv", PARAM].split([16, 4, 4])
    widths = ((10, 6), (3, 1), (3, 1))
    first, second = (read_slice(source, "qkv", PARAM, fused_slice(0, widths, rank)) for rank in (0, 1))
    assert torch.equal(first, torch.cat([q[:10], k[:3], v[:3]]))
    assert torch.equal(second, torch.cat([q[10:], k[3:], v[3:]]))


def test_a_padded_vocabulary_ends_in_zeros(source: ElasticSource) -> None:
    found = read_slice(source, "qkv", PARAM, Slice(dim=0, cuts=((20, 24),), padded=6))
    assert torch.equal(found[:4], VALUES["qkv", PARAM][20:])
    assert found.shape == (6, 6)
    assert not found[4:].any()


def test_impossible_slices_are_refused(source: ElasticSource) -> None:
    with pytest.raises(CheckpointError, match="has no dimension 2"):
        read_slice(source, "qkv", PARAM, Slice(dim=2, cuts=((0, 1),)))
    with pytest.raises(CheckpointError, match=r"\[20, 25\) is not inside dimension 0"):
        read_slice(source, "qkv", PARAM, Slice(dim=0, cuts=((20, 25),)))
    with pytest.raises(CheckpointError, match="cannot be padded to 3"):
        Slice(dim=0, cuts=((0, 4),), padded=3)
    with pytest.raises(CheckpointError, match="there is no 'param' of 'x'"):
        read_slice(source, "x", PARAM, Slice(dim=0, cuts=()))
