"""Tests that objects come out of a parcel as they were put in, without copies of tensors and arrays."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

from elastic.engine.streaming import digest_of
from elastic.memory import parcel
from elastic.memory.parcel import Parcel


def through(value: Any) -> Any:
    descriptor, sizes = Parcel.of(value).written()
    try:
        return parcel.opened(descriptor, sizes)
    finally:
        os.close(descriptor)


_DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (1,), (), (0, 4)])
def test_tensors_keep_bits_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    value = (torch.randn(shape) * 3).to(dtype)
    found = through(value)
    assert (found.dtype, found.shape) == (value.dtype, value.shape)
    assert digest_of([found]) == digest_of([value])
    found.zero_()  # it can be changed
    assert found.data_ptr() % 64 == 0 or not found.numel()


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(6, 4).t(),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(8)[::2],
        torch.randn(4).expand(3, 4),
        torch.view_as_complex(torch.randn(4, 2)).conj(),
        torch.nn.Parameter(torch.randn(3)),
    ],
    ids=["transposed", "channels_last", "slices", "expanded", "conjugated", "parameter"],
)
def test_tensors_of_other_kinds_keep_their_kind(value: torch.Tensor) -> None:
    found = through(value)
    assert type(found) is type(value)
    assert torch.equal(found, value)
    assert found.requires_grad == value.requires_grad
    assert value.stride() == found.stride() or value.is_conj()


def test_containers_and_arrays_come_out_as_they_were() -> None:
    value = {"x": [np.arange(6.0).reshape(2, 3), np.zeros(0), "text"], "y": (1, 2.5, None, b"b"), "z": torch.ones(3, 3)}
    found = through(value)
    assert digest_of([found]) == digest_of([value])
    found["x"][0][:] = 0
    assert value["x"][0].sum() == 15


def test_memory_of_tensors_is_not_in_the_pickle() -> None:
    made = Parcel.of([torch.zeros(1 << 20), np.zeros(1 << 20)])
    assert len(made.pickled) < 2000
    assert [buffer.raw().nbytes for buffer in made.buffers] == [4 << 20, 8 << 20]


def test_what_cannot_be_written_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise OSError("no memory")

    before = sorted(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(parcel, "_write", fails)
    with pytest.raises(OSError, match="no memory"):
        Parcel.of(1).written()
    assert sorted(os.listdir("/proc/self/fd")) == before
