"""What every way to send tensors over links must do: one set of rules for all implementations, on any device, over any kind of network.

A rule is given a function that makes linked workers, and the device that the process computes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from elastic.engine.tensor_links import InPlaceLinks, TensorLinks, tensor_links
from elastic.errors import PeerLost
from elastic.memory.tensors import bytes_of
from tests.comm.comm_cluster import PATIENCE_S, Cluster, clusters, tag, until

Make = Callable[[int], Cluster]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


def of(c: Cluster, workers: int = 2) -> list[TensorLinks]:
    return [tensor_links(c[worker]) for worker in range(workers)]


def values(on: torch.device, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (100 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype).to(on)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bytes_of(one).tobytes() == bytes_of(other).tobytes()


def refuses(kind: type[Exception], call: Callable[[], Any]) -> None:
    try:
        call()
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")


def tensors_arrive_with_their_bits(make: Make, on: torch.device) -> None:
    one, other = of(make(2))
    for number, dtype in enumerate(DTYPES):
        for shape in ((), (0, 3), (5, 7), (40_001,)):
            sent = values(on, *shape, seed=number, dtype=dtype)
            sink = other.sink(torch.zeros_like(sent))
            sink.post(0, tag(number))
            one.send(1, tag(number), sent)
            one.push()
            assert sink.size == sent.nbytes
            assert same(sink.take(), sent), (dtype, shape)


def parts_are_one_message(make: Make, on: torch.device) -> None:
    one, other = of(make(2))
    matrix = values(on, 6, 8)
    one.send(1, tag(), b"head", matrix, b"", matrix[:0], matrix.t(), b"tail")
    one.push()
    expected = b"head" + bytes_of(matrix).tobytes() + bytes_of(matrix.t().contiguous()).tobytes() + b"tail"
    assert other.network.receive(0, tag()).tobytes() == expected


def the_beginning_of_a_message_is_on_the_host(make: Make, on: torch.device) -> None:
    one, other = of(make(2))
    sink = other.sink(torch.zeros(64 + 40, dtype=torch.uint8, device=on))
    for step in (1, 2):
        sink.post(0, tag(step))
        one.send(1, tag(step), step.to_bytes(64, "little"), values(on, 10, seed=step))
        one.push()
        assert same(sink.take()[64:].view(torch.float32), values(on, 10, seed=step))
        assert sink.head(64).tobytes() == step.to_bytes(64, "little")


def what_is_sent_are_the_values_of_the_computation_so_far(make: Make, on: torch.device) -> None:
    one, other = of(make(2))
    tensor = torch.ones(50_000, device=on)
    sink, source = other.sink(torch.zeros_like(tensor)), one.source(tensor)
    for step in range(1, 6):
        sink.post(0, tag(step))
        tensor.mul_(2)
        source(1, tag(step))
        one.flush()
        received = sink.take()
        tensor.add_(0)  # allowed: it was flushed
        assert same(received, torch.full_like(received, 2.0**step))


def computation_before_sees_the_old_values_and_computation_after_the_new_ones(make: Make, on: torch.device) -> None:
    one, other = of(make(2))
    target = torch.full((30_000,), 7.0, device=on)
    sink = other.sink(target)
    sink.post(0, tag())
    before = target * 2
    one.send(1, tag(), torch.full((30_000,), 5.0, device=on))
    one.push()
    assert sink.take() is target
    after = target * 2
    target.zero_()  # allowed: it was taken
    assert same(before, torch.full_like(before, 14.0))
    assert same(after, torch.full_like(after, 10.0))


def a_sink_is_filled_again_and_again(make: Make, on: torch.device) -> None:
    one, other = of(make(2))
    tensors = [values(on, 9_000, seed=step) for step in range(8)]
    sink = other.sink(torch.zeros(9_000, device=on))
    found = []
    for step, tensor in enumerate(tensors):
        sink.post(0, tag(step))
        one.send(1, tag(step), tensor)
        one.push()
        found.append(sink.take() + 0)
    assert all(same(*pair) for pair in zip(found, tensors, strict=True))


def a_sink_is_filled_from_this_host_too(make: Make, on: torch.device) -> None:
    (links,) = of(make(1), 1)
    sink = links.sink(torch.zeros(100, device=on))
    for seed in (1, 2):
        assert same(sink.fill(bytes_of(values(on, 100, seed=seed))), values(on, 100, seed=seed))


def a_message_that_has_arrived_can_be_taken_at_once(make: Make, on: torch.device) -> None:
    one, other = of(make(2))
    sink = other.sink(torch.zeros(100, device=on))
    sink.post(0, tag())
    assert not sink.arrived()
    one.send(1, tag(), values(on, 100))
    one.flush()
    until(sink.arrived)
    assert same(sink.take(), values(on, 100))


def a_worker_that_waits_holds_nothing_back(make: Make, on: torch.device) -> None:
    """Nobody pushes: the message goes out when its sender waits for the answer."""
    c = make(2)
    one, other = of(c)
    there, here = other.sink(torch.zeros(200_000, device=on)), one.sink(torch.zeros(200_000, device=on))

    def answer() -> None:
        other.send(0, tag(2), there.take() + 1)
        refuses(PeerLost, lambda: other.network.receive(0, tag(3)))

    for step in range(3):
        there.post(0, tag(1))
        here.post(1, tag(2))
        answered = c.blocked(1, answer) if step == 2 else None
        one.send(1, tag(1), torch.full((200_000,), float(step), device=on))
        if answered is None:
            one.push()
            other.send(0, tag(2), there.take() + 1)
            other.push()
        assert same(here.take(), torch.full((200_000,), step + 1.0, device=on))
    c[0].close()
    assert answered is not None
    answered.result(PATIENCE_S)


def nothing_of_an_earlier_attempt_arrives_in_a_later_one(make: Make, on: torch.device) -> None:
    c = make(2)
    one, other = of(c)
    one.send(1, tag(), values(on, 100, seed=1))
    c.install(range(2))
    sink = other.sink(torch.zeros(100, device=on))
    sink.post(0, tag())
    one.send(1, tag(), values(on, 100, seed=2))
    one.push()
    assert same(sink.take(), values(on, 100, seed=2))


def ways_understand_each_other(make: Make, on: torch.device) -> None:
    """What one way sends, another one receives."""
    c = make(2)
    one, other = tensor_links(c[0]), InPlaceLinks(c[1])
    sent, back = values(on, 3_000), values(torch.device("cpu"), 3_000, seed=1)
    there, here = other.sink(torch.zeros(3_000)), one.sink(torch.zeros(3_000, device=on))
    there.post(0, tag())
    here.post(1, tag())
    one.send(1, tag(), sent)
    other.send(0, tag(), back)
    one.push()
    assert same(there.take(), sent)
    assert same(here.take(), back)


def only_contiguous_tensors_are_registered(make: Make, on: torch.device) -> None:
    (links,) = of(make(1), 1)
    for use in (links.source, links.sink):
        refuses(ValueError, lambda use=use: use(torch.zeros(4, 4, device=on)[:, 1]))


def a_lost_link_is_an_error(make: Make, on: torch.device) -> None:
    c = make(2)
    one, other = of(c)
    sink = one.sink(torch.zeros(10, device=on))
    sink.post(1, tag())
    waiting = c.blocked(0, sink.take)
    other.network.close()
    refuses(PeerLost, waiting.result)
    refuses(PeerLost, lambda: one.send(1, tag(), torch.zeros(10, device=on)))


RULES = (
    tensors_arrive_with_their_bits,
    parts_are_one_message,
    the_beginning_of_a_message_is_on_the_host,
    what_is_sent_are_the_values_of_the_computation_so_far,
    computation_before_sees_the_old_values_and_computation_after_the_new_ones,
    a_sink_is_filled_again_and_again,
    a_sink_is_filled_from_this_host_too,
    a_message_that_has_arrived_can_be_taken_at_once,
    a_worker_that_waits_holds_nothing_back,
    nothing_of_an_earlier_attempt_arrives_in_a_later_one,
    ways_understand_each_other,
    only_contiguous_tensors_are_registered,
    a_lost_link_is_an_error,
)


def check(rule: Callable[[Make, torch.device], None], kind: str, on: torch.device) -> None:
    """Runs a rule over a kind of network."""
    made = clusters(kind)
    make = next(made)
    try:
        rule(make, on)
    finally:
        next(made, None)


def main() -> None:
    """Checks all rules on the fake device. Copies are late, unless memory cannot be pinned."""
    from elastic.memory import device
    from tests import fakedevice

    on = torch.device("fake", 1)
    device.use(on)
    for kind in ("unix", "loopback"):
        for rule in RULES:
            before = fakedevice.extension.late_copies()
            check(rule, kind, on)
            copies = rule not in (only_contiguous_tensors_are_registered, a_lost_link_is_an_error)
            assert (fakedevice.extension.late_copies() > before) == (copies and os.environ.get("FAKE_DEVICE_PINS") != "0"), rule.__name__
