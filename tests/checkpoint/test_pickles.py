"""Tests that files of torch.save are read as torch reads them, and that hostile ones are refused and run no code."""

from __future__ import annotations

import argparse
import enum
import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.checkpoint.dtypes import name_of
from elastic.checkpoint.pickles import Global, Opaque, PickleLimits, load, number, plain
from elastic.checkpoint.pickles.archive import Archive
from elastic.checkpoint.pickles.write import Streamed, save
from elastic.checkpoint.state import Spec
from elastic.errors import CheckpointError


class Stage(int, enum.Enum):
    three = 3


class Calls:
    """Reduces to a call of anything."""

    def __init__(self, function, *args) -> None:
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def _archive(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        for key, data in (storages or {}).items():
            file.writestr(f"archive/data/{key}", data)
    return path


def _tensor(offset: int, shape: tuple, stride: tuple, count: int = 4, kind=torch.FloatStorage, properties: tuple = ()) -> bytes:
    """A pickle of one tensor in storage 0, whatever its numbers."""

    class Storage:
        pass

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, shape, stride, False, OrderedDict(), *properties)

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", kind, "0", "cpu", count) if isinstance(obj, Storage) else None

    file = io.BytesIO()
    Pickler(file, protocol=2).dump(Tensor())
    return file.getvalue()


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64]),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_any_run_of_any_view_is_what_torch_loads(tmp_path_factory, shape, order, dtype, cut):
    axes = list(range(len(shape)))
    order.shuffle(axes)
    base = torch.arange(2 * torch.Size(shape).numel() + 3).to(dtype)
    view = base[3:].reshape(*shape, 2)[..., 1].permute(axes)
    path = tmp_path_factory.getbasetemp() / "view.pt"
    torch.save({"view": view, "same": base}, path)
    found = load(path)["view"]
    start, stop = sorted(int(part * view.numel()) for part in cut)
    assert found.spec.shape == tuple(view.shape)
    assert torch.equal(found.run(start, stop), view.reshape(-1)[start:stop])


def test_objects_of_training_scripts(tmp_path):
    value = {
        "args": argparse.Namespace(lr=0.1, layers=[1, 2]),
        "stage": Stage.three,
        "dtype": torch.bfloat16,
        "shape": torch.Size([2, 3]),
        "device": torch.device("cuda:1"),
        "numpy": np.float64(2.5),
        "bytes": b"\x00\xff",
        "set": {1, 2},
        "order": OrderedDict(a=(1, None, True)),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "step": torch.tensor(7.0),
    }
    torch.save(value, tmp_path / "a.pt")
    found = load(tmp_path / "a.pt")
    assert isinstance(found["args"], Opaque)
    assert found["args"].cls == Global("argparse", "Namespace")
    assert plain(found["args"]) == {"lr": 0.1, "layers": [1, 2]}
    assert number(found["stage"]) == 3
    assert number(found["step"]) == 7.0
    for key in ("dtype", "numpy", "bytes", "set", "order"):
        assert found[key] == value[key]
    assert (found["shape"], found["device"]) == ((2, 3), "cuda:1")
    assert found["parameter"].run(0, 2).tolist() == [1, 1]
    dropped: list[str] = []
    assert plain({"a": float("inf"), "b": found["parameter"]}, dropped) == {"a": None, "b": None}
    assert dropped == ["/a", "/b"]


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize(
    ("dtype", "properties", "reason"),
    [
        (torch.FloatStorage, {"quantized": True}, "has the unknown properties quantized"),
        (torch.FloatStorage, {"conj": 1}, "has the unknown properties conj"),
        (torch.FloatStorage, [1], "has the unknown properties list"),
        (torch.FloatStorage, {"conj": True}, "is conjugated, but its dtype is float32"),
    ],
)
def test_properties_that_are_not_known_are_refused(tmp_path, trusted, dtype, properties, reason):
    path = _archive(tmp_path / "a.pt", _tensor(0, (4,), (1,), kind=dtype, properties=(properties,)), {"0": bytes(16)})
    with pytest.raises(CheckpointError, match=reason):
        load(path, trusted=trusted)


def test_trusted_runs_the_pickle(tmp_path):
    torch.save({"args": argparse.Namespace(lr=0.1), "w": torch.arange(6.0).reshape(2, 3)}, tmp_path / "a.pt")
    found = load(tmp_path / "a.pt", trusted=True)
    assert found["args"].lr == 0.1
    assert found["w"].run(1, 4).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "call",
    [
        Calls(os.system, "touch hacked"),
        Calls(eval, "open('hacked', 'w')"),
        Calls(exec, "open('hacked', 'w')"),
        Calls(getattr, Calls(__import__, "os"), "system"),
        Calls(Path.touch, Path("hacked")),
        Calls(torch.load, "hacked"),
        Calls(open, "hacked", "w"),
    ],
    ids=lambda call: call.call[0].__name__,
)
def test_a_call_becomes_an_opaque_value_and_runs_nothing(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    path = _archive(tmp_path / "a.pt", pickle.dumps({"x": call}, protocol=2))
    assert isinstance(load(path)["x"], Opaque)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("pickled", "reason"),
    [
        (b"\x80\x02K\x01X\x02\x00\x00\x00ls\x85R.", "calls something that is not a name"),
        (b"(S'ls'\nios\nsystem\n.", "uses STRING at byte 1"),
        (b"\x80\x02\x82\x01.", "uses EXT1"),
        (b"\x80\x02Vx\n.", "uses UNICODE"),
        (b"\x80\x02K\x01r\xff\xff\xff\xff", "damaged"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b".", "damaged"),
        (b"\x80\x02\x8b" + struct.pack("<i", 200) + b"\x7f" * 200 + b".", "more than 512 bits"),
        (b"\x80\x02" + b")" + b"\x85" * 100_000 + b"}" + b"j\x00\x00\x00\x00.", "damaged"),
        (b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s.", "a key of type tuple"),
        (b"\x80\x02K\x01K\x02.", "does not end with exactly one value"),
        (b"\x80\x02(.", "does not end with exactly one value"),
        (b"\x80\x02R.", "damaged"),
        (b"\x80\x02X\x01\x00\x00\x00aQ.", "refers to something outside"),
        (b"\x80\x02ccollections\nOrderedDict\nK\x01b.", "damaged|state"),
        (b"\x80\x02K\x01}b.", "sets the state of a int"),
        (b"", "damaged"),
    ],
)
def test_a_hostile_pickle_is_refused_by_name(tmp_path, pickled, reason):
    path = _archive(tmp_path / "bad.pt", pickled)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load(path)
    assert "bad.pt" in str(caught.value)


def test_what_contains_itself_is_read_and_is_no_json(tmp_path):
    path = _archive(tmp_path / "a.pt", b"\x80\x02]q\x00h\x00a.")
    found = load(path)
    assert found[0] is found
    dropped: list[str] = []
    plain(found, dropped)
    assert dropped


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (_tensor(0, (5,), (1,)), "reaches element 4 of a storage of 4"),
        (_tensor(1, (4,), (1,)), "reaches element 4"),
        (_tensor(0, (2, 2), (3, 1)), "reaches element 4"),
        (_tensor(-1, (4,), (1,)), "not counts"),
        (_tensor(0, (4,), (-1,)), "not counts"),
        (_tensor(0, (1 << 60, 1 << 60), (0, 0)), "elements in a storage of 4"),
        (_tensor(0, (1 << 63,), (0,)), "not counts"),
        (_tensor(0, (True,), (1,)), "not counts"),
        (_tensor(0, (4,), ()), "1 sizes and 0 strides"),
        (_tensor(0, (5,), (1,), count=5), "storage of 16 bytes instead of 20"),
        (_tensor(0, (2,), (1,), kind=torch.DoubleStorage), "storage of 16 bytes instead of 32"),
        (_tensor(0, ("4",), (1,)), "not counts"),
    ],
)
def test_a_view_that_leaves_its_storage_is_refused(tmp_path, tensor, reason):
    path = _archive(tmp_path / "bad.pt", tensor, {"0": bytes(16)})
    with pytest.raises(CheckpointError, match=reason):
        load(path)


def test_a_bomb_or_another_file_is_refused(tmp_path):
    bomb = _archive(tmp_path / "bomb.pt", b"\0" * 1_000_000, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"bomb\.pt.*compressed"):
        load(bomb)
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"text\.pt.*trust-pickle"):
        load(tmp_path / "text.pt")
    torch.save({}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"old\.pt.*trust-pickle"):
        load(tmp_path / "old.pt")
    torch.save(list(range(300)), tmp_path / "big.pt")
    with pytest.raises(CheckpointError, match="more than the limit of 100"):
        load(tmp_path / "big.pt", limits=PickleLimits(pickle_bytes=100))
    with pytest.raises(CheckpointError, match="more than 100 operations"):
        load(tmp_path / "big.pt", limits=PickleLimits(operations=100))
    with pytest.raises(CheckpointError, match=r"none\.pt"):
        load(tmp_path / "none.pt")


def test_every_truncation_is_refused(tmp_path):
    torch.save({"w": torch.arange(8.0)}, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    for length in range(0, len(data), 7):
        (tmp_path / "a.pt").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"a\.pt"):
            load(tmp_path / "a.pt")


@settings(deadline=None)
@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_found_by_verify_or_harmless(tmp_path_factory, position, bit):
    path = tmp_path_factory.getbasetemp() / "flip.pt"
    torch.save({"w": torch.arange(8.0)}, path)
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << bit
    path.write_bytes(data)
    try:
        found = load(path)
        Archive(path).verify()
    except CheckpointError:
        return
    assert found["w"].run(0, 8).tolist() == list(range(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_streamed_file_is_what_torch_opens(tmp_path, dtype, mapped):
    first, second = torch.arange(24).to(dtype).reshape(2, 3, 4), torch.ones(()).to(dtype)
    pieces = [
        Streamed(spec=Spec(shape=tuple(t.shape), dtype=name_of(dtype)), chunks=lambda t=t: t.reshape(-1).split(5)) for t in (first, second)
    ]
    save({"a": pieces[0], "b": [pieces[1], pieces[0]], "n": torch.Size([3])}, tmp_path / "a.pt")
    found = torch.load(tmp_path / "a.pt", mmap=mapped, weights_only=True)
    assert torch.equal(found["a"], first)
    assert torch.equal(found["b"][0], second)
    assert found["a"].data_ptr() % dtype.itemsize == 0
    assert torch.equal(load(tmp_path / "a.pt")["a"].run(3, 9), first.reshape(-1)[3:9])
