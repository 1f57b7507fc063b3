"""Tests tensors stored as slices: reads return the whole tensor, other programs see the slices, and every command works."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from elastic.checkpoint.blocks import BLOCK_BYTES
from elastic.checkpoint.commit import begin, commit, save, write_runs
from elastic.checkpoint.directory import collect, newest, temporary
from elastic.checkpoint.manifest import MANIFEST
from elastic.checkpoint.plan import INDEX, plan_files
from elastic.checkpoint.reader import ElasticSource
from elastic.checkpoint.retention import KeepLast, retire
from elastic.checkpoint.slices import Slice, Slicing, read_slice
from elastic.checkpoint.state import PARAM
from elastic.checkpoint.store import LocalStore
from elastic.checkpoint.writer import TensorRun
from elastic.errors import CheckpointError
from tests.checkpoint.format_samples import contents_of as sample_contents
from tests.checkpoint.format_samples import equals, values_at, whole_runs
from tests.checkpoint.sliced_samples import DTYPES, any_bits, bits, contents_of, reference, shapes, slicings
from tests.checkpoint.test_damage import rewrite

QKV = Slicing(dim=0, widths=((20, 8), (6, 3), (6, 3)))
EMBED = Slicing(dim=0, widths=((40, 30),), padded=(40, 40))
COLUMNS = Slicing(dim=1, widths=((15, 50),), padded=(20, 52))
SHAPES = {"qkv": (46, 33), "embed": (70, 1000), "down": (33, 65), "bias": (33,)}
KEPT = {"qkv": QKV, "embed": EMBED, "down": COLUMNS}
VALUES = values_at(7, SHAPES)
SLICINGS = {key: KEPT[key[0]] for key in VALUES if key[0] in KEPT}


def loaded(directory: Path) -> dict[tuple[int, str], torch.Tensor]:
    """By rank (-1: whole) and name in the file, as safetensors reads them."""
    found = {}
    for path in directory.glob("*.safetensors"):
        rank = int(path.name.split("-tp")[1].split("-")[0]) if "-tp" in path.name else -1
        found |= {(rank, name): tensor for name, tensor in load_file(path).items()}
    return found


@given(st.data())
@settings(max_examples=12, deadline=None)
def test_slices_of_any_kind_hold_the_tensor_and_any_run_of_it_is_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A: slices, written in any runs. B: other slices, from runs of A. C: whole again, from B; the same files as if saved so at once."""
    drawn = data.draw(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=3))
    values = {(f"t{i}", state): any_bits(shape, dtype, i) for i, (shape, dtype) in enumerate(drawn) for state in (PARAM, "exp_avg")}
    contents, stores = contents_of(values), [LocalStore(tmp_path_factory.mktemp("slices")) for _ in range(4)]
    kept = [{key: data.draw(slicings(tuple(value.shape))) for key, value in values.items() if data.draw(st.booleans())} for _ in range(2)]
    parts: list[TensorRun] = []
    for (name, state), tensor in values.items():
        flat = tensor.reshape(-1)
        for start, stop in pairwise(sorted({0, flat.numel(), *data.draw(st.lists(st.integers(0, flat.numel()), max_size=3))})):
            parts.append((name, state, start, flat[start:stop]))
    most = data.draw(st.sampled_from([200, 1 << 30]))
    save(stores[0], contents, data.draw(st.permutations(parts)), step=1, slicings=kept[0], max_file_bytes=most)
    first = ElasticSource(stores[0], "step-00000001")
    first.verify()
    assert first.slicings == kept[0]
    on_disk = loaded(Path(stores[0].where("step-00000001")))
    for (name, state), tensor in values.items():
        stored, slicing = name if state == PARAM else f"{name}/{state}", kept[0].get((name, state))
        if slicing is None:
            assert bits(on_disk[-1, stored]) == bits(tensor)
        for rank in range(slicing.ranks if slicing else 0):
            assert on_disk[rank, stored].shape == reference(tensor, slicing, rank).shape  # pyright: ignore[reportArgumentType]
            assert bits(on_disk[rank, stored]) == bits(reference(tensor, slicing, rank))  # pyright: ignore[reportArgumentType]
        start, stop = sorted(data.draw(st.tuples(*[st.integers(0, tensor.numel())] * 2)))
        assert bits(first.read(name, state, start, stop)) == bits(tensor.reshape(-1)[start:stop])

    def resliced(source: ElasticSource, store: LocalStore, slicings: dict[tuple[str, str], Slicing]) -> ElasticSource:
        runs = ((*key, 0, source.read(*key, 0, value.numel())) for key, value in values.items())
        save(store, contents, runs, step=1, slicings=slicings)
        return ElasticSource(store, "step-00000001")

    resliced(resliced(first, stores[1], kept[1]), stores[2], {})
    save(stores[3], contents, whole_runs(values), step=1)
    again, directly = (Path(store.where("step-00000001")) for store in stores[2:])
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {path.name: path.read_bytes() for path in directly.iterdir()}


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_slice_is_read_from_any_slices(sliced: ElasticSource, data: st.DataObject) -> None:
    name, state = data.draw(st.sampled_from(sorted(VALUES)))
    tensor = VALUES[name, state]
    if not tensor.ndim:
        return
    wanted = data.draw(slicings(tuple(tensor.shape)))
    for rank, each in enumerate(wanted.slices):
        found = read_slice(sliced, name, state, each)
        assert bits(found) == bits(reference(tensor, wanted, rank))


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> ElasticSource:
    store = LocalStore(tmp_path_factory.mktemp("sliced"))
    save(store, sample_contents(VALUES), whole_runs(VALUES), step=7, slicings=SLICINGS, max_file_bytes=150_000)
    source = newest(store, verify=True)
    assert source is not None
    return source


def test_files_say_whose_they_are(sliced: ElasticSource) -> None:
    names = set(sliced.manifest.files)
    assert {"model-tp0-00001-of-00003.safetensors", "model-tp1-00003-of-00003.safetensors", "model-00001-of-00001.safetensors"} <= names
    assert any(name.startswith("optimizer-tp1-") for name in names)
    assert INDEX not in names, "a program that knows no slices would take one for the whole"
    directory = Path(sliced._store.where(sliced.name))
    for rank in (0, 1):
        index = json.loads((directory / f"model-tp{rank}.safetensors.index.json").read_bytes())
        assert index["weight_map"].keys() == sliced.contents.tensors.keys()
        tensors = {name: load_file(directory / file)[name] for name, file in index["weight_map"].items()}
        assert torch.equal(tensors["qkv"], reference(VALUES["qkv", PARAM], QKV, rank))
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_writers_of_other_slices_of_the_same_shapes_are_refused(tmp_path: Path) -> None:
    """Two parts of which each rank has 3 and 1 rows, and of which each has 2 and 2: the headers of their files are equal."""
    contents = sample_contents(values_at(1, {"a": (8, 4)}))
    plans = [
        plan_files(contents, 1 << 30, {("a", PARAM): Slicing(dim=0, widths=widths)}) for widths in (((3, 3), (1, 1)), ((2, 2), (2, 2)))
    ]
    assert plans[0].files == plans[1].files
    store = LocalStore(tmp_path)
    with pytest.raises(CheckpointError, match="plans other files"):
        write_runs(plans[1], store, begin(store, plans[0], step=1), [])


def test_every_byte_of_slices_is_written_once(tmp_path: Path) -> None:
    store, plan = LocalStore(tmp_path), plan_files(sample_contents(VALUES), 1 << 30, SLICINGS)
    runs = whole_runs(VALUES)
    with pytest.raises(CheckpointError, match=r"model-tp0-00001-of-00001.safetensors: .* were written; byte .* was not"):
        save(store, sample_contents(VALUES), [run for run in runs if run[:2] != ("down", PARAM)], step=1, slicings=SLICINGS)
    with pytest.raises(CheckpointError, match=r"optimizer-tp0-00001-of-00001.safetensors: .* were written twice"):
        save(store, sample_contents(VALUES), [*runs, ("down", "exp_avg", 0, VALUES["down", "exp_avg"])], step=1, slicings=SLICINGS)
    ticket = begin(store, plan, step=1)
    cut = {key: value.numel() // 3 for key, value in VALUES.items()}
    receipts = [
        write_runs(plan, store, ticket, [(*key, 0, value.reshape(-1)[: cut[key]]) for key, value in VALUES.items()]),
        write_runs(plan, store, ticket, [(*key, cut[key], value.reshape(-1)[cut[key] :]) for key, value in VALUES.items()]),
    ]
    commit(store, plan, ticket, receipts)
    found = newest(store, verify=True)
    assert found is not None
    assert equals(found, VALUES)


class Used(LocalStore):
    """Files are made of what was there before."""

    def create(self, path: str, size: int) -> None:
        super().create(path, size)
        file = self.open_write(path)
        file.write(np.full(size, 0xA5, dtype=np.uint8), 0)
        file.close()


def test_padding_is_written_and_not_only_promised(tmp_path: Path) -> None:
    """In a store that makes no zeros by itself; more of them than are written at a time."""
    store, values = Used(tmp_path), values_at(1, {"a": (3, 5000), "b": (7, 3)})
    kept = {("a", PARAM): Slicing(dim=0, widths=((3, 0),), padded=(3, 70)), ("b", PARAM): Slicing(dim=1, widths=((2, 1),), padded=(4, 2))}
    save(store, sample_contents(values), whole_runs(values), step=1, slicings=kept)
    source = ElasticSource(store, "step-00000001")
    source.verify()
    assert equals(source, values)
    on_disk = loaded(tmp_path / "step-00000001")
    for (name, state), slicing in kept.items():
        assert bits(on_disk[1, name]) == bits(reference(values[name, state], slicing, 1))


@pytest.mark.parametrize(
    ("shape", "slicing"),
    [
        pytest.param((3000, 700), Slicing(dim=0, widths=((750,) * 4,)), id="rows"),
        pytest.param((3000, 700), Slicing(dim=0, widths=((900, 300, 300, 0), (100, 200, 400, 800))), id="fused uneven rows"),
        pytest.param((3000, 700), Slicing(dim=1, widths=((175,) * 4,)), id="columns"),
        pytest.param((3000, 700), Slicing(dim=1, widths=((100, 200), (250, 150))), id="fused uneven columns"),
        pytest.param((2990, 700), Slicing(dim=0, widths=((1500, 1490),), padded=(1500, 1500)), id="padded rows"),
        pytest.param((8, 200_000), Slicing(dim=1, widths=((150_000, 50_000),), padded=(300_000, 300_000)), id="wide padding between rows"),
    ],
)
def test_little_more_is_read_than_is_asked_for(tmp_path: Path, shape: tuple[int, int], slicing: Slicing) -> None:
    """5 %, and two partial blocks for each slice that the run touches (for each row of it, where wide padding lies between)."""
    values = {("a", PARAM): torch.arange(math.prod(shape), dtype=torch.int32).reshape(shape)}
    store = LocalStore(tmp_path)
    save(store, contents_of(values), whole_runs(values), step=1, slicings={("a", PARAM): slicing})
    size = math.prod(shape)
    for start, stop in ((0, size), (size // 3, 2 * size // 3), (size // 2, size // 2 + 1000), (size - 1, size)):
        source = ElasticSource(store, "step-00000001")
        assert torch.equal(source.read("a", PARAM, start, stop), torch.arange(start, stop, dtype=torch.int32))
        ends = sum((1 if slicing.dim == 0 or shape[0] > 8 else 8) * len(patch.pieces) for patch in slicing.patches(shape, start, stop))
        assert source.bytes_read <= 1.05 * 4 * (stop - start) + 2 * BLOCK_BYTES * ends
    in_runs = ElasticSource(store, "step-00000001")
    for start in range(0, size, 1 << 18):
        in_runs.read("a", PARAM, start, min(size, start + (1 << 18)))
    assert in_runs.bytes_read <= 1.05 * 4 * size + 2 * BLOCK_BYTES * slicing.ranks * len(slicing.widths) * (8 if shape[0] == 8 else 1)
    for rank, own in enumerate(slicing.slices):
        of_rank = ElasticSource(store, "step-00000001")
        found = read_slice(of_rank, "a", PARAM, own)
        rows = shape[0] if shape[0] == 8 else 1
        assert of_rank.bytes_read <= 1.05 * 4 * own.width * size / shape[slicing.dim] + 2 * BLOCK_BYTES * len(own.cuts) * rows
        assert torch.equal(found, reference(values["a", PARAM], slicing, rank))


def test_damage_in_a_slice_is_found_where_it_is(sliced: ElasticSource, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    save(store, sample_contents(VALUES), whole_runs(VALUES), step=7, slicings={("embed", PARAM): EMBED})
    path = tmp_path / "step-00000007" / "model-tp1-00001-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # in the padding
    path.write_bytes(data)
    source = ElasticSource(store, "step-00000007")
    source.read("embed", PARAM, 0, 40_000)
    assert [problem for problem in source.problems() if "model-tp1" in problem and "damaged" in problem]
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model-tp1-00001-of-00001.safetensors: damaged: bytes from 0 on"):
        ElasticSource(store, "step-00000007").read("embed", PARAM, 39_000, 41_000)


def _entry(**changed: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["tensors"]["embed"][PARAM].update(changed)


def _slicing(**changed: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["tensors"]["embed"][PARAM]["slicing"].update(changed)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda body: body["tensors"]["embed"][PARAM].pop("slicing"), "malformed .KeyError: 'file'"),
        (_entry(slices=[]), "has 0 slices for 2 ranks"),
        (_entry(slices=[{"file": "manifest.json", "offset": 0}] * 2), "lies outside of its file"),
        (_entry(slicing=None), "malformed"),
        (_entry(shape=[71, 1000]), r"is not a slicing of a tensor of shape \[71, 1000\]"),
        (_slicing(dim=2), "is not a slicing of"),
        (_slicing(dim=-1), "-1 is not a count"),
        (_slicing(widths=[[40, 31]]), "is not a slicing of"),
        (_slicing(widths=[[40, 20], [10]]), "one width for each rank"),
        (_slicing(widths=[]), "one width for each rank"),
        (_slicing(widths=[[80, -10]]), "-10 is not a count"),
        (_slicing(padded=[40, 29]), "cannot be padded to"),
        (_slicing(padded=[40]), "cannot be padded to"),
        (_slicing(padded=[40, 1 << 40]), "lies outside of its file"),
    ],
)
def test_impossible_slices_in_a_manifest_are_refused(
    sliced: ElasticSource, tmp_path: Path, change: Callable[[dict[str, Any]], None], match: str
) -> None:
    save(LocalStore(tmp_path), sample_contents(VALUES), whole_runs(VALUES), step=7, slicings={("embed", PARAM): EMBED})
    rewrite(tmp_path / "step-00000007" / MANIFEST, change)
    with pytest.raises(CheckpointError, match=f"step-00000007/{MANIFEST}: .*{match}"):
        ElasticSource(LocalStore(tmp_path), "step-00000007")


def test_other_slices_than_the_files_hold_are_found(tmp_path: Path) -> None:
    save(LocalStore(tmp_path), sample_contents(VALUES), whole_runs(VALUES), step=7, slicings={("embed", PARAM): EMBED})
    rewrite(tmp_path / "step-00000007" / MANIFEST, _slicing(widths=[[35, 35]], padded=None))
    with pytest.raises(CheckpointError, match="its header and the manifest differ on 'embed'"):
        ElasticSource(LocalStore(tmp_path), "step-00000007").verify()


def test_old_and_unfinished_ones_are_removed(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for step in (1, 2, 3):
        save(store, sample_contents(VALUES), whole_runs(VALUES), step=step, slicings=SLICINGS)
    begin(store, plan_files(sample_contents(VALUES), 1 << 30, SLICINGS), step=4)
    assert retire(store, [KeepLast(1)]) == ["step-00000002", "step-00000001"]
    assert len(collect(store, older_than_s=0, now=time.time() + 60)) == 1
    assert temporary(store) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003"]


def test_slicings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    contents = sample_contents(VALUES)
    with pytest.raises(CheckpointError, match=r"'bias', 'param': dimension 0 by 2: 20\+8 \| 6\+3 \| 6\+3 is not a slicing of .* \[33\]"):
        plan_files(contents, 1 << 30, {("bias", PARAM): QKV})
    with pytest.raises(CheckpointError, match="'x', 'param' is to be kept as slices, but there is no such tensor"):
        plan_files(contents, 1 << 30, {("x", PARAM): QKV})
    with pytest.raises(CheckpointError, match="cannot be padded to"):
        replace(EMBED, padded=(40, 29))
    assert Slicing(dim=0, widths=((1, 2),), padded=(3, 3)).slices == (
        Slice(dim=0, cuts=((0, 1),), padded=3),
        Slice(dim=0, cuts=((1, 3),), padded=3),
    )
