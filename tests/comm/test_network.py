"""Tests failures that only real sockets have: unknown peers, broken streams, the I/O thread, and leaks."""

from __future__ import annotations

import os
import socket
import threading
from typing import cast
from urllib.parse import unquote

import numpy as np
import pytest
from comm_cluster import PATIENCE_S, clusters, pattern, tag, until

from elastic.comm import Network
from elastic.comm.link import Link
from elastic.comm.message import MessageHeader
from elastic.comm.sending import Sender
from elastic.errors import LinkError, PeerLost

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(params=["unix", "tcp", "tls"])
def cluster(request: pytest.FixtureRequest):
    yield from clusters(request.param)


def connect(network: Network) -> socket.socket:
    """A stranger's connection."""
    parts = dict(part.split(":", 1) for part in network.address.split(","))
    if "tcp" in parts:
        ip, port = parts["tcp"].rsplit(":", 1)
        return socket.create_connection((ip, int(port)), PATIENCE_S)
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE_S)
    sock.connect(unquote(parts["unix"]))
    return sock


def test_another_secret_is_refused_at_both_ends(cluster):
    c = cluster(1)
    stranger = c.start(1, secret=b"another secret")
    with pytest.raises(LinkError, match=r"no handshake with worker 0 .* another secret") as caught:
        stranger.install(1, 0, c.members([0, 1]), [0], timeout_s=PATIENCE_S)
    assert not isinstance(caught.value, PeerLost)
    until(lambda: c[0].rejected == 1)
    assert c[0].stats.links == frozenset()


def test_a_dialer_with_another_secret_does_not_get_in_later(cluster):
    c = cluster(1)
    c.start(1, secret=b"another secret")
    with pytest.raises(LinkError, match=r"no link to workers \[1\]"):
        c[0].install(1, 0, c.members([0, 1]), [1], timeout_s=0.05)


def test_an_address_that_another_worker_has_taken_over_is_refused(cluster):
    c = cluster(2, installed=False)
    c.start(2)
    wrong = [c.members([0])[0].__class__(1, c.host(1), c[0].address), *c.members([2])]
    with pytest.raises(LinkError, match="not the expected worker"):
        c[2].install(1, 0, wrong, [1], timeout_s=PATIENCE_S)


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(200)])
def test_strangers_do_no_harm(cluster, said):
    c = cluster(2)
    with connect(c[0]) as stranger:
        stranger.sendall(said)
    c[1].send(0, tag(), b"x")
    assert c[0].receive(1, tag()).tobytes() == b"x"
    c.start(2)
    c.install([0, 1, 2])


def test_garbage_on_a_link_breaks_it_with_a_reason(cluster):
    c = cluster(2)
    waiting = c.blocked(0, lambda: c[0].receive(1, tag()))
    c[1]._links[0]._stream.sendmsg([memoryview(b"garbage!" * 10)])
    with pytest.raises(LinkError, match="worker 1 broke the protocol"):
        waiting.result(PATIENCE_S)
    until(lambda: not c[1].stats.links)


def test_a_message_without_a_waiting_receiver_is_read_by_the_one_thread(cluster):
    before = threading.active_count()
    c = cluster(4)
    assert threading.active_count() <= before + 4 + 4  # one each, and the threads that ran the installs
    c[0].send(1, tag(), pattern(1_000_000))
    until(lambda: c[1].arrived(0, tag()))


def test_what_the_kernel_has_no_room_for_is_pushed_while_the_sender_computes(cluster):
    c = cluster(2)
    data = pattern(30_000_000)
    link = c[1]._links[0]
    assert isinstance(link, Link)
    with link._reader:
        c[0].send(1, tag(), data)
        assert c[0]._links[1].sender.pending
    assert np.array_equal(c[1].receive(0, tag()), data)
    c[0].flush()
    assert not c[0]._links[1].sender.pending


def test_a_message_half_received_does_not_touch_posted_memory_in_the_next_era(cluster):
    c = cluster(2)
    data = np.ones(20_000_000, np.uint8)
    place = np.zeros_like(data)
    c[1].post(0, tag(), place)
    link = c[1]._links[0]
    with link._reader:
        c[0].send(1, tag(), data)
        until(lambda: link._receiver.read() or link._receiver.filling)
        assert not place.all()
    # Both ends start the new attempt at any point of the transfer; when install returns, the memory belongs to the caller again.
    c[1]._box.advance((2, 0))
    c[1]._settle()
    place[:] = 0
    c.install([0, 1], (3, 0))
    c[0].send(1, tag(), b"after")
    assert c[1].receive(0, tag()).tobytes() == b"after"
    assert not place.any()


def test_messages_queued_in_an_earlier_era_are_not_sent_any_more(cluster):
    c = cluster(2)
    link = c[1]._links[0]
    with link._reader:
        for i in range(3):
            c[0].send(1, tag(i), pattern(20_000_000))
        sent = c[0].stats.bytes_sent
        c[0]._box.advance((2, 0))
        c[0]._settle()
    c.install([0, 1], (3, 0))
    c[0].flush()
    # The transfer that has started must finish; the others must not start.
    assert c[0].stats.bytes_sent - sent < 21_000_000


def test_half_a_message_of_a_lost_link_does_not_hold_up_its_successor(cluster):
    c = cluster(2)
    link = c[1]._links[0]
    with link._reader:
        c[0].send(1, tag(), pattern(60_000_000))  # more than buffers of the kernel hold
        until(lambda: link._receiver.read() or link._receiver.filling)
        c[0].drop(1)
    until(lambda: not c[1].stats.links)
    c.install([0, 1], c.attempt_id)
    c[0].send(1, tag(), b"again")
    assert c[1].receive(0, tag()).tobytes() == b"again"


def test_a_new_link_from_a_peer_ends_the_old_one_even_before_its_end_was_read(cluster):
    c = cluster(2)
    old = c[0]._links[1]
    waiting = c.blocked(0, lambda: wait_for_failure(c[0]))
    with old._reader:
        c[1].drop(0)
        ahead = c.blocked(1, lambda: c[1].install(2, 0, c.members([0, 1]), [0], timeout_s=PATIENCE_S))
        until(lambda: c[0]._links[1] is not old)
    with pytest.raises(PeerLost, match="the other end dropped it"):
        waiting.result(PATIENCE_S)
    assert c[0].stats.links == {1}
    c[0].install(2, 0, c.members([0, 1]), [1], timeout_s=PATIENCE_S)
    ahead.result(PATIENCE_S)


def wait_for_failure(network: Network) -> None:
    """Waits without reading from a socket."""
    with network._box.waiter(None) as waiter:
        while True:
            waiter.clear()
            network._box.check((1, 0))
            waiter.wait()


class FullThenFree:
    """A stream that has no room at first."""

    unsent = False

    def __init__(self) -> None:
        self.room = False
        self.taken: list[bytes] = []

    def sendmsg(self, views: list[memoryview]) -> int:
        if not self.room:
            raise BlockingIOError
        self.taken.append(b"".join(views))
        return len(self.taken[-1])


def test_a_message_queued_just_before_the_sending_half_is_released_is_not_left_behind():
    sock, armed = FullThenFree(), []

    def arm(wanted: bool) -> None:
        armed.append(wanted)
        if not wanted:
            # Another thread sends now: it finds the lock taken and relies on its holder.
            sender.send(MessageHeader(attempt_id=(1, 0), tag=tag(2), bytes=6), [memoryview(b"second")])

    sender = Sender(cast(socket.socket, sock), arm=arm, emptied=lambda: None)
    sender.send(MessageHeader(attempt_id=(1, 0), tag=tag(1), bytes=5), [memoryview(b"first")])
    assert sender.pending
    sock.room = True
    sender.push(ready=True)
    assert [part[-6:] for part in sock.taken] == [b"\x00first", b"second"]
    assert armed == [True, False]


def test_many_buffers_are_more_than_one_system_call_takes(cluster):
    c = cluster(2)
    parts = [bytes([i % 256]) * (i % 50) for i in range(3000)]
    c[0].send(1, tag(), *parts)
    assert c[1].receive(0, tag()).tobytes() == b"".join(parts)


def test_a_defect_on_the_io_thread_stops_every_wait_and_lets_the_peers_know(cluster):
    c = cluster(3)
    hook, threading.excepthook = threading.excepthook, lambda _: None

    def defective(peer: int, error: Exception) -> None:
        raise RuntimeError("defect in a callback")

    try:
        c[0].on_failure = defective
        remote = c.blocked(1, lambda: c[1].receive(0, tag(), fail_any=False))
        local = c.blocked(0, lambda: c[0].receive(1, tag(), fail_any=False))
        c[2].close()
        with pytest.raises(RuntimeError, match="defect in a callback"):
            local.result(PATIENCE_S)
        with pytest.raises(PeerLost):
            remote.result(PATIENCE_S)
        c[0].close()
    finally:
        threading.excepthook = hook


def test_closing_leaves_no_descriptor_and_no_thread(cluster):
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before, threads = descriptors(), {thread for thread in threading.enumerate() if thread.name.startswith("elastic-links")}
    c = cluster(3)
    c.install([0, 1, 2])
    assert descriptors() > before
    c.close()
    assert descriptors() == before
    assert {thread for thread in threading.enumerate() if thread.name.startswith("elastic-links")} == threads
