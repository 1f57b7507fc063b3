"""Tests the package's guarantees for the memory of tensors: alignment, sharing, writability, and access to bytes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from elastic.memory import raw, tensors
from elastic.memory.tensors import HostBytes, Landing, bytes_of, of_bytes

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 63, 4096])
def test_memory_starts_aligned(dtype: torch.dtype, size: int):
    made = [tensors.empty(size, dtype), tensors.zeros((size, 2), dtype), tensors.filled(size, 1, dtype)]
    made += [tensors.zeros_like(made[1]), tensors.copy(made[1][1:])]
    made.append(tensors.contiguous(tensors.zeros((size, 3), dtype)[:, 1]))
    assert [tensor.data_ptr() % raw.ALIGNMENT_BYTES for tensor in made] == [0] * len(made)
    assert raw.empty(size).ctypes.data % raw.ALIGNMENT_BYTES == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4)])
def test_bytes_come_back_as_they_were(dtype: torch.dtype, shape: tuple[int, ...]):
    tensor = torch.randint(0, 2, shape).to(dtype)
    again = of_bytes(bytes_of(tensor).copy(), dtype, shape)
    assert again.dtype == dtype
    assert torch.equal(again, tensor)


def test_bytes_to_be_read_are_the_tensors_own_and_cannot_be_written_to():
    tensor = torch.arange(6.0)
    memory, asked = bytes_of(tensor), HostBytes(tensor)
    tensor[0] = 7.0
    assert memory[:4].tobytes() == np.float32(7.0).tobytes() == asked.now()[:4].tobytes()
    for each in (memory, asked.now()):
        with pytest.raises(ValueError, match="read-only"):
            each[0] = 1
        with pytest.raises(ValueError, match="read-only"):
            raw.as_writable_bytes(each)


def test_bytes_of_what_does_not_lie_in_a_row_are_a_copy_in_row_major_order():
    tensor = torch.arange(6.0).reshape(2, 3).t()
    assert bytes_of(tensor).tobytes() == tensor.contiguous().numpy().tobytes()


def test_a_landing_gives_what_was_written_to_its_bytes():
    flat = torch.zeros(8)
    landing = Landing(flat[2:6])
    assert landing.size == 16
    raw.as_writable_bytes(landing.bytes)[:] = raw.as_bytes(np.arange(4, dtype=np.float32))
    assert landing.take().tolist() == [0.0, 1.0, 2.0, 3.0]
    assert flat.tolist() == [0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 0.0, 0.0]


@pytest.mark.parametrize("make", [HostBytes, Landing])
def test_a_copy_is_never_taken_for_the_tensors_own_bytes(make: type):
    with pytest.raises(ValueError, match="is not contiguous"):
        make(torch.zeros(4, 4)[:, :2])


def test_bytes_of_a_parameter_that_needs_a_gradient():
    parameter = torch.nn.Parameter(torch.ones(3))
    assert bytes_of(parameter).tobytes() == np.ones(3, dtype=np.float32).tobytes()
    assert tensors.values_of(parameter).tolist() == [1.0, 1.0, 1.0]


def test_other_types_of_the_same_bytes():
    memory = torch.zeros(8, dtype=torch.uint8)
    tensors.retyped(memory, torch.float32)[1] = 1.0
    assert memory[4:].tolist() == list(np.float32(1.0).tobytes())
    with pytest.raises(RuntimeError):
        tensors.retyped(memory[:3], torch.float32)


@pytest.mark.parametrize("shape", [(8, 1), (1, 8), (2, 4), (3,), (1, 1, 2)])
def test_tensors_without_memory_are_known(shape: tuple[int, ...]):
    found = tensors.hollow(shape, torch.uint8)
    assert found.shape == shape
    assert tensors.is_hollow(found)
    assert not any(map(tensors.is_hollow, (torch.zeros(shape), torch.zeros(8, 8)[:3, :1], torch.zeros(0), torch.zeros(()))))


def test_rows_do_not_reach_beyond_their_memory():
    memory = np.arange(10, dtype=np.int32)
    assert raw.rows(memory, 3, 2, 4).tolist() == [[0, 1], [4, 5], [8, 9]]
    assert np.shares_memory(raw.rows(memory, 3, 2, 4), memory)
    with pytest.raises(ValueError, match="do not fit into 9"):
        raw.rows(memory[1:], 3, 2, 4)


@pytest.mark.slow
def test_links_need_no_torch():
    code = "import sys, elastic.comm, elastic.memory.raw; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
