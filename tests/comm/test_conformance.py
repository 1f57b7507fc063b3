"""Tests what every communicator guarantees about messages and waits: one suite for all implementations."""

from __future__ import annotations

import numpy as np
import pytest
from comm_cluster import PATIENCE_S, pattern, tag, together, until

from elastic.comm.message import HEADER_BYTES
from elastic.errors import Interrupted, LinkError, PeerLost

pytestmark = pytest.mark.timeout(60)


def test_buffers_arrive_as_one_message_in_memory_of_ones_own(cluster):
    c = cluster(2)
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    c[0].send(1, tag(), b"head", matrix, memoryview(bytearray(b"tail")), np.float64(2.5).reshape(()), b"")
    got = c[1].receive(0, tag())
    assert got.tobytes() == b"head" + matrix.tobytes() + b"tail" + np.float64(2.5).tobytes()
    assert got.dtype == np.uint8
    assert got.ctypes.data % 64 == 0
    got[:] = 0
    assert matrix[2, 3] == 11


def test_a_message_may_be_empty(cluster):
    c = cluster(2)
    c[0].send(1, tag())
    c[0].send(1, tag(2), np.empty((0, 3)))
    assert c[1].receive(0, tag()).size == 0
    assert c[1].receive(0, tag(2)).size == 0


@pytest.mark.parametrize("size", [1, 100_000, 3_000_001])
def test_a_posted_message_ends_in_the_posted_memory(cluster, size):
    c = cluster(2)
    place, data = np.zeros(size, np.uint8), pattern(size)
    c[1].post(0, tag(), place)
    sent = c.run(lambda: c[0].send(1, tag(), data))
    assert np.shares_memory(c[1].receive(0, tag()), place)
    sent.result()
    assert np.array_equal(place, data)


def test_posting_keeps_the_shape_of_what_was_posted(cluster):
    c = cluster(2)
    place = np.zeros((3, 5), np.float32)
    c[1].post(0, tag(), place)
    c[0].send(1, tag(), np.arange(15, dtype=np.float32))
    c[1].receive(0, tag())
    assert place[2, 4] == 14


def test_a_message_that_arrived_before_it_was_posted_is_copied(cluster):
    c = cluster(2)
    c[0].send(1, tag(), pattern(1000))
    until(lambda: c[1].arrived(0, tag()))
    place = np.zeros(1000, np.uint8)
    c[1].post(0, tag(), place)
    assert np.shares_memory(c[1].receive(0, tag()), place)
    assert np.array_equal(place, pattern(1000))


@pytest.mark.parametrize("posted_first", [True, False])
def test_a_wrong_size_is_told_to_the_receiver_and_spares_the_link(cluster, posted_first):
    c = cluster(2)
    if posted_first:
        c[1].post(0, tag(), bytearray(8))
    c[0].send(1, tag(), b"123456789")
    if not posted_first:
        until(lambda: c[1].arrived(0, tag()))
        c[1].post(0, tag(), bytearray(8))
    with pytest.raises(LinkError, match=r"worker 0 sent 9 bytes .* 8 were posted"):
        c[1].receive(0, tag())
    c[0].send(1, tag(2), b"next")
    assert c[1].receive(0, tag(2)).tobytes() == b"next"


def test_tags_tell_messages_apart_and_equal_tags_keep_their_order(cluster):
    c = cluster(2)
    for name in (b"one", b"two", b"three"):
        c[0].send(1, tag(7), name)
    c[0].send(1, tag(8), b"other")
    assert c[1].receive(0, tag(8)).tobytes() == b"other"
    assert [c[1].receive(0, tag(7)).tobytes() for _ in range(3)] == [b"one", b"two", b"three"]


def test_tags_may_be_as_large_as_their_fields_and_no_larger(cluster):
    c = cluster(2)
    large = tag(2**64 - 1, 2**32 - 1)
    c[0].send(1, large, b"x")
    assert c[1].receive(0, large).tobytes() == b"x"


def test_arrived_only_when_whole(cluster):
    c = cluster(2)
    assert not c[1].arrived(0, tag())
    c[1].post(0, tag(), bytearray(3))
    assert not c[1].arrived(0, tag())
    c[0].send(1, tag(), b"abc")
    until(lambda: c[1].arrived(0, tag()))
    c[1].receive(0, tag())
    assert not c[1].arrived(0, tag())


@pytest.mark.slow
@pytest.mark.parametrize("posted", [True, False])
def test_everybody_sends_much_to_everybody_before_anybody_receives(cluster, posted):
    workers, size = range(4), 6_000_000
    c = cluster(4)

    def exchange(me: int) -> None:
        others = [other for other in workers if other != me]
        if posted:
            for other in others:
                c[me].post(other, tag(), np.empty(size, np.uint8))
        mine = pattern(size, me)
        for other in others:
            c[me].send(other, tag(), mine)
        for other in others:
            assert np.array_equal(c[me].receive(other, tag()), pattern(size, other))
        c[me].flush()

    together(*(lambda me=me: exchange(me) for me in workers))


@pytest.mark.slow
def test_threads_share_a_link(cluster):
    c = cluster(2)
    threads, messages = 4, 60

    def talk(me: int, lane: int) -> None:
        for i in range(messages):
            c[me].send(1 - me, tag(i, lane), pattern(1 + (i * 7919) % 40_000, lane))
            got = c[me].receive(1 - me, tag(i, lane))
            assert np.array_equal(got, pattern(1 + (i * 7919) % 40_000, lane))

    together(*(lambda me=me, lane=lane: talk(me, lane) for me in (0, 1) for lane in range(threads)))


def test_only_contiguous_memory_travels_and_only_writable_memory_is_posted(cluster):
    c = cluster(2)
    with pytest.raises(ValueError, match="C-contiguous"):
        c[0].send(1, tag(), np.zeros((4, 4))[:, 1])
    with pytest.raises(ValueError, match="C-contiguous"):
        c[0].post(1, tag(), np.zeros((4, 4)).T)
    with pytest.raises(ValueError, match="read-only"):
        c[0].post(1, tag(), b"constant")


def test_flush_returns_when_all_is_on_its_way(cluster):
    c = cluster(2)
    c[1].post(0, tag(), np.empty(20_000_000, np.uint8))
    data = pattern(20_000_000)
    c[0].send(1, tag(), data)
    c[0].flush()
    expected = data.copy()
    data[:] = 0
    assert np.array_equal(c[1].receive(0, tag()), expected)


def test_both_ends_count_the_same_bytes(cluster):
    c = cluster(2)
    before = c[0].stats, c[1].stats
    for size in (0, 1, 5000):
        c[0].send(1, tag(size), pattern(size))
        c[1].receive(0, tag(size))
    sender, receiver = c[0].stats, c[1].stats
    assert sender.bytes_sent - before[0].bytes_sent == 3 * HEADER_BYTES + 5001
    assert receiver.bytes_received - before[1].bytes_received == 3 * HEADER_BYTES + 5001
    assert sender.messages - before[0].messages == receiver.messages_received - before[1].messages_received == 3
    assert sender.links == {1}


def test_counts_outlive_their_links(cluster):
    c = cluster(2)
    c[0].send(1, tag(), pattern(5000))
    c[1].receive(0, tag())
    c[0].drop(1)
    assert c[0].stats.bytes_sent > 5000
    assert c[0].stats.links == frozenset()


# --- what ends a wait


def test_a_blocked_receive_sees_its_peer_close(cluster):
    c = cluster(2)
    waiting = c.blocked(0, lambda: c[0].receive(1, tag()))
    c[1].close()
    with pytest.raises(PeerLost, match="worker 1") as caught:
        waiting.result(PATIENCE_S)
    assert caught.value.peer == 1


def test_a_receive_into_posted_memory_sees_its_peer_close(cluster):
    c = cluster(2)
    c[0].post(1, tag(), bytearray(10))
    waiting = c.blocked(0, lambda: c[0].receive(1, tag()))
    c[1].close()
    with pytest.raises(PeerLost):
        waiting.result(PATIENCE_S)


def test_the_loss_of_any_link_ends_every_wait_unless_told_otherwise(cluster):
    c = cluster(3)
    any_link = c.blocked(0, lambda: c[0].receive(1, tag()))
    that_link = c.blocked(0, lambda: c[0].receive(1, tag(2), fail_any=False))
    c[2].close()
    with pytest.raises(PeerLost) as caught:
        any_link.result(PATIENCE_S)
    assert caught.value.peer == 2
    c[1].send(0, tag(2), b"still here")
    assert that_link.result(PATIENCE_S).tobytes() == b"still here"


def test_what_arrived_before_the_loss_is_still_delivered(cluster):
    c = cluster(2)
    c[1].send(0, tag(), b"last words")
    c[1].flush()
    c[1].close()
    until(lambda: c[0].stats.links == frozenset())
    assert c[0].receive(1, tag()).tobytes() == b"last words"
    with pytest.raises(PeerLost):
        c[0].receive(1, tag())


def test_the_loss_is_reported_once_where_it_was_suffered(cluster):
    c = cluster(2)
    heard: dict[int, list[tuple[int, Exception]]] = {0: [], 1: []}
    for worker in (0, 1):
        c[worker].on_failure = lambda peer, error, worker=worker: heard[worker].append((peer, error))
    c[1].drop(0)
    until(lambda: heard[0])
    with pytest.raises(PeerLost):
        c[0].receive(1, tag())
    [(peer, error)] = heard[0]
    assert peer == 1
    assert isinstance(error, PeerLost)
    assert heard[1] == []


def test_nothing_is_sent_to_or_awaited_from_a_worker_without_a_link(cluster):
    c = cluster(2)
    c[0].drop(1)
    for use in (lambda: c[0].send(1, tag(), b""), lambda: c[0].receive(1, tag()), lambda: c[0].receive(5, tag())):
        with pytest.raises(PeerLost):
            use()


def test_dropping_a_link_ends_waits_on_it_here(cluster):
    c = cluster(3)
    waiting = c.blocked(0, lambda: c[0].receive(1, tag()))
    other = c.blocked(0, lambda: c[0].receive(2, tag()))
    c[0].drop(1)
    with pytest.raises(PeerLost):
        waiting.result(PATIENCE_S)
    c[2].send(0, tag(), b"kept")
    assert other.result(PATIENCE_S).tobytes() == b"kept"


def test_an_interruption_ends_present_and_later_waits_until_resumed(cluster):
    c = cluster(2)
    waiting = c.blocked(0, lambda: c[0].receive(1, tag()))
    c[0].interrupt(Interrupted("new view"))
    with pytest.raises(Interrupted, match="new view"):
        waiting.result(PATIENCE_S)
    c[1].send(0, tag(), b"x")
    with pytest.raises(Interrupted, match="new view"):
        c[0].receive(1, tag())
    c[0].resume()
    assert c[0].receive(1, tag()).tobytes() == b"x"


def test_closing_ends_ones_own_waits_for_good(cluster):
    c = cluster(2)
    waiting = c.blocked(0, lambda: c[0].receive(1, tag()))
    c[0].close()
    c[0].close()
    with pytest.raises(Interrupted, match="closed"):
        waiting.result(PATIENCE_S)
    c[0].resume()
    with pytest.raises(Interrupted, match="closed"):
        c[0].receive(1, tag())
