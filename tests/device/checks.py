"""What the fake device must do, as functions that run on it: each fails with an assertion, or breaks a rule of the device on purpose."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from elastic.memory import device, pinned, sums
from elastic.memory.digest import digest
from elastic.memory.tensors import bytes_of, contiguous
from tests import fakedevice

ON = torch.device("fake", 1)


def computes_and_draws() -> None:
    device.use(ON)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(17, 8), nn.LayerNorm(8), nn.Dropout(0.2), nn.Linear(8, 17)).to(ON)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    tokens = torch.arange(32).remainder(17).to(ON)
    losses = []
    for _ in range(8):
        with torch.autocast("fake", dtype=torch.bfloat16):
            output = model(tokens)
        assert output.dtype == torch.bfloat16
        loss = functional.cross_entropy(output.float(), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def generators_are_keyed_per_device() -> None:
    device.use(ON)
    device.seed_generator(3)
    host = torch.default_generator.get_state()
    first = torch.rand(8, device=ON)
    assert torch.equal(host, torch.default_generator.get_state())
    state = device.generator_state()
    second = torch.rand(8, device=ON)
    assert state is not None
    assert not torch.equal(first, second)
    device.set_generator_state(state)
    assert torch.equal(second, torch.rand(8, device=ON))
    device.seed_generator(3)
    assert torch.equal(first, torch.rand(8, device=ON))
    device.seed_generator(3 + (1 << 63))
    assert not torch.equal(first, torch.rand(8, device=ON))


def digests_are_those_of_the_host() -> None:
    generator = torch.Generator().manual_seed(1)
    for size in (0, 1, 3, 4, 5, 8, 9, 8191, 8192, 8193, 8196, 40001, (4 << 20) + 20):
        values = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        assert digest(values.to(ON)) == digest(values) == sums.digest_of(bytes_of(values)), size
    values = torch.randn(5000, generator=generator)
    assert digest(values.bfloat16().to(ON)[64:]) == digest(values.bfloat16()[64:])


def memory_is_aligned_and_poisoned() -> None:
    device.use(ON)
    assert torch.empty(7, device=ON).isnan().all()
    aligned = contiguous(torch.zeros(1000, device=ON)[3:])
    assert aligned.data_ptr() % device.DEVICE_ALIGNMENT_BYTES == 0


def copies_on_the_side_are_late() -> None:
    device.use(ON)
    source, pins = torch.arange(4096.0, device=ON), pinned.PinnedMemory()
    target, side = pins.lasting(4096, torch.float32), device.SideStream()
    before = fakedevice.extension.late_copies()
    with side.after_computation():
        target.copy_(source, non_blocking=True)
    assert fakedevice.extension.late_copies() == before + 1
    assert not side.over
    assert not torch.equal(target, torch.arange(4096.0))
    side.wait()
    assert side.over
    assert torch.equal(target, torch.arange(4096.0))
    source.add_(1)  # allowed: the host has waited
    pins.release()


def memory_is_limited() -> None:
    device.use(ON)
    free, total = device.free_bytes() or (0, 0)
    assert 0 < free <= total
    try:
        torch.empty(total + 1, dtype=torch.uint8, device=ON)
    except torch.OutOfMemoryError as error:
        assert f"{total} bytes are free" in str(error) or "out of memory" in str(error)  # noqa: PT017
    else:
        raise AssertionError("more memory than there is")


def errors_are_sticky() -> None:
    values = torch.ones(3, device=ON)
    fakedevice.fail(1, "uncorrectable ECC error")
    for attempt in (lambda: values + 1, lambda: values.cpu(), lambda: torch.empty(3, device=ON), lambda: device.module(ON).synchronize(ON)):
        try:
            attempt()
        except torch.AcceleratorError as error:
            assert "uncorrectable ECC error" in str(error)  # noqa: PT017
        else:
            raise AssertionError("a broken device has computed")
    torch.ones(3, device="fake:2").add_(1)


CHECKS = (
    computes_and_draws,
    generators_are_keyed_per_device,
    digests_are_those_of_the_host,
    memory_is_aligned_and_poisoned,
    copies_on_the_side_are_late,
    memory_is_limited,
    errors_are_sticky,  # last: the device stays broken
)


def read_by_the_host() -> Any:
    return ctypes.string_at(torch.ones(3, device=ON).data_ptr(), 4)


def written_to_before_the_copy_is_over() -> Any:
    device.use(ON)
    source, side = torch.zeros(64, device=ON), device.SideStream()
    target = pinned.PinnedMemory().lasting(64, torch.float32)
    with side.after_computation():
        target.copy_(source, non_blocking=True)
    source.add_(1)


def copied_before_it_is_computed() -> Any:
    device.use(ON)
    source, stream = torch.zeros(64, device=ON).add_(1), torch.Stream(device=ON)
    with stream:
        pinned.PinnedMemory().lasting(64, torch.float32).copy_(source, non_blocking=True)


def read_before_it_arrived() -> Any:
    device.use(ON)
    source = torch.zeros(64, pin_memory=True)
    target, stream = torch.ones(64, device=ON), torch.Stream(device=ON)
    torch.Event(device=ON).record()
    torch.accelerator.synchronize(ON)
    with stream:
        target.copy_(source, non_blocking=True)
    return target + 1


def two_devices() -> Any:
    return torch.ones(3, device=ON) + torch.ones(3, device="fake:0")


def host_tensor() -> Any:
    return torch.mm(torch.ones(3, 3, device=ON), torch.ones(3, 3))


def generator_of_the_host() -> Any:
    return torch.empty(3, device=ON).normal_(generator=torch.Generator())


BROKEN = {
    written_to_before_the_copy_is_over: "writes to memory that stream 1 has read, without having waited",
    copied_before_it_is_computed: "reads memory that stream 0 has written to, without having waited",
    read_before_it_arrived: "reads memory that stream",
    two_devices: "same device",
    host_tensor: "same device",
    generator_of_the_host: "generator",
}


def main() -> None:
    """Runs everything, except what ends the process."""
    for broken, why in BROKEN.items():
        try:
            broken()
        except RuntimeError as error:
            assert why in str(error), (broken.__name__, str(error))  # noqa: PT017
        else:
            raise AssertionError(f"{broken.__name__} was not found")
    for check in CHECKS:
        check()
