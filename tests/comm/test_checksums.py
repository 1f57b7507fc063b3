"""Tests that a change to any byte of a message is detected before the message is used."""

from __future__ import annotations

import socket

import numpy as np
import pytest
from comm_cluster import PATIENCE_S, Cluster, pattern, tag, until
from hypothesis import example, given, settings
from hypothesis import strategies as st

from elastic.comm import MessageKind, Tag
from elastic.comm.mailbox import Mailbox
from elastic.comm.message import HEADER_BYTES, MessageHeader, checksum, described
from elastic.comm.receiving import Receiver
from elastic.errors import LinkError, PeerLost
from elastic.memory.raw import as_bytes

pytestmark = pytest.mark.timeout(60)

ERA = (3, 2)


@pytest.fixture(params=["unix", "tcp"])
def cluster(request: pytest.FixtureRequest):
    made: list[Cluster] = []

    def make(size: int) -> Cluster:
        made.append(Cluster(request.param, range(size)))
        return made[-1].install(range(size), ERA)

    yield make
    for each in made:
        each.close()


def wire(data: bytes, of: Tag) -> bytearray:
    """A message as it travels."""
    return bytearray(MessageHeader(attempt_id=ERA, tag=of, bytes=len(data), checksum=checksum(memoryview(data))).pack() + data)


def received(message: bytes) -> tuple[Receiver, Mailbox]:
    """Returns the receiver and the mailbox after this message and the end of the stream."""
    here, there = socket.socketpair()
    with here, there:
        here.setblocking(False)
        box = Mailbox()
        box.advance(ERA)
        receiver = Receiver(here, 1, 0, box)
        there.sendall(message)
        there.shutdown(socket.SHUT_WR)
        while receiver.broken is None:
            receiver.read()
        return receiver, box


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.data())
@example(b"", None)
def test_any_flipped_bit_of_a_message_is_found(data, more):
    of = Tag(MessageKind.ACTIVATION, 17, 1, 2)
    whole = wire(data, of)
    bit = 8 * len(whole) - 1 if more is None else more.draw(st.integers(0, 8 * len(whole) - 1))
    whole[bit // 8] ^= 1 << bit % 8
    receiver, box = received(bytes(whole))
    assert type(receiver.broken) is LinkError
    assert not any(box.has((ERA, 0, each)) for each in (of, *(key[2] for key in box._slots)))
    found = str(receiver.broken)
    assert "worker 0" in found
    assert "worker 1" in found
    assert ("activation message of epoch 3, attempt 2, step 17" in found) == (bit >= 8 * HEADER_BYTES)


def test_an_undamaged_message_ends_with_its_stream_only():
    receiver, box = received(bytes(wire(b"data", tag())))
    assert isinstance(receiver.broken, PeerLost)
    assert box.has((ERA, 0, tag()))


def test_a_damaged_message_is_a_lost_link_which_is_made_anew(cluster):
    c = cluster(2)
    data = pattern(3_000_000)
    place = np.zeros_like(data)
    of = Tag(MessageKind.PARAMETER, 17, 1)
    c[1].post(0, of, place)
    waiting = c.blocked(1, lambda: c[1].receive(0, of))
    damaged = wire(data.tobytes(), of)
    damaged[2_000_000] ^= 1
    sock = c[0]._links[1]._sock
    sock.setblocking(True)
    sock.sendall(damaged)
    with pytest.raises(LinkError, match=r"worker 1 did not get what worker 0 sent, the parameter message of epoch 3, attempt 2, step 17"):
        waiting.result(PATIENCE_S)
    until(lambda: not c[0].stats.links)
    c.install([0, 1], (4, 0))
    c[1].post(0, of, place)
    c[0].send(1, of, data)
    assert np.array_equal(c[1].receive(0, of), data)


def test_memory_that_changes_before_it_was_sent_is_found(cluster):
    c = cluster(2)
    data = pattern(30_000_000)
    with c[1]._links[0]._reader:
        c[0].send(1, tag(), data)
        assert c[0]._links[1].sender.pending
        data[-1] ^= 1
    with pytest.raises(LinkError, match="checksums differ"):
        c[1].receive(0, tag())


def test_checksums_of_parts_make_that_of_the_whole():
    parts = [pattern(size, size) for size in (0, 1, 5000, 70_000)]
    proof = 0
    for part in parts:
        proof = checksum(as_bytes(part).data, proof)
    assert proof == checksum(np.concatenate(parts).data)


@pytest.mark.parametrize(
    ("of", "said"),
    [
        (Tag(MessageKind.CONTROL_READY, 2 * 12), "control ready message of epoch 3, attempt 2, step 12"),
        (Tag(MessageKind.CONTROL_APPLY, 2 * 12 + 1), "control apply message of epoch 3, attempt 2, step 12"),
        (Tag(MessageKind.COLLECT, 1 << 63 | 4), "collect message of epoch 3, attempt 2, collective 4"),
        (Tag(77, 1), "kind 77 message of epoch 3, attempt 2, step 1"),
    ],
)
def test_a_message_is_named_as_people_know_it(of, said):
    assert described(ERA, of) == f"the {said}"
