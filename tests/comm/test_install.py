"""Tests in-place changes of links: which are kept, dropped and created, and the handling of messages of other attempts."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from comm_cluster import KINDS, OVER_TCP, PATIENCE_S, Cluster, pattern, tag, together, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastic.errors import Interrupted, LinkError, PeerLost

pytestmark = pytest.mark.timeout(60)


def exchange(c: Cluster, workers: list[int]) -> None:
    """Everybody sends to everybody, in the present attempt."""
    for me in workers:
        for other in workers:
            if me != other:
                c[me].send(other, tag(c.attempt_id[0], me), pattern(3000, me))
    for me in workers:
        for other in workers:
            if me != other:
                assert np.array_equal(c[me].receive(other, tag(c.attempt_id[0], other)), pattern(3000, other))


def test_a_new_era_keeps_the_links_that_stay(cluster):
    c = cluster(3)
    kept = c[0]._links[1]
    c.install([0, 1])
    assert c[0]._links == {1: kept}
    until(lambda: c[2].stats.links == frozenset())
    exchange(c, [0, 1])


def test_members_join_an_installed_group(cluster):
    c = cluster(2)
    c.start(2)
    c.install([0, 1, 2])
    exchange(c, [0, 1, 2])


def test_peers_are_added_within_an_era(cluster):
    c = cluster(3, installed=False)
    members = c.members([0, 1, 2])
    together(lambda: c[0].install(1, 0, members, [1]), lambda: c[1].install(1, 0, members, [0]))
    c[0].send(1, tag(), b"early")
    together(*(lambda w=w: c[w].install(1, 0, members, [0, 1, 2]) for w in (0, 1, 2)))
    assert c[1].receive(0, tag()).tobytes() == b"early"
    exchange(c, [0, 1, 2])


@pytest.mark.parametrize("dropper", [0, 1])
def test_a_link_that_one_end_dropped_is_made_anew(cluster, dropper):
    c = cluster(2)
    c[dropper].drop(1 - dropper)
    c.install([0, 1])
    exchange(c, [0, 1])


@pytest.mark.parametrize("late", [0, 1])
def test_a_link_lost_while_it_is_being_agreed_on_is_made_anew(cluster, late):
    c = cluster(2)
    early, heard = 1 - late, c[late].stats.messages_received
    members = c.members([0, 1])
    ahead = c.blocked(early, lambda: c[early].install(2, 0, members, [late], timeout_s=PATIENCE_S))
    until(lambda: c[late].stats.messages_received > heard)
    c[late].drop(early)
    c[late].install(2, 0, members, [early], timeout_s=PATIENCE_S)
    ahead.result(PATIENCE_S)
    c.attempt_id = (2, 0)
    exchange(c, [0, 1])


def test_what_was_posted_for_a_lost_link_is_not_filled_by_the_next_one(cluster):
    c = cluster(2)
    place = np.zeros(4, np.uint8)
    c[0].post(1, tag(), place)
    c[1].drop(0)
    until(lambda: not c[0].stats.links)
    c.install([0, 1], c.attempt_id)
    c[1].send(0, tag(), b"abcd")
    assert c[0].receive(1, tag()).tobytes() == b"abcd"
    assert not place.any()


def test_a_failure_is_over_with_the_next_era(cluster):
    c = cluster(3)
    c[2].close()
    with pytest.raises(PeerLost):
        c[0].receive(1, tag())
    c.install([0, 1])
    exchange(c, [0, 1])


def test_a_message_of_an_earlier_era_is_dropped_and_counted(cluster):
    c = cluster(2)
    c[0].send(1, tag(), b"too late")
    until(lambda: c[1].arrived(0, tag()))
    members = c.members([0, 1])
    # Worker 1 starts the new attempt while worker 0 is still in the old one and sends one more message.
    ahead = c.blocked(1, lambda: c[1].install(2, 0, members, [0]))
    c[0].send(1, tag(2), b"stale")
    until(lambda: c[1].stats.stale_dropped == 1)
    c[0].install(2, 0, members, [1])
    ahead.result(PATIENCE_S)
    c[0].send(1, tag(), b"fresh")
    assert c[1].receive(0, tag()).tobytes() == b"fresh"
    assert not c[1].arrived(0, tag(2))


def test_a_message_of_a_later_era_waits_for_it(cluster):
    c = cluster(3)
    members = c.members([0, 1, 2])
    before = c[2].stats.messages_received
    # Workers 0 and 1 are linked in the new attempt; worker 0 still waits there for worker 2.
    slow = c.blocked(0, lambda: c[0].install(2, 0, members, [1, 2]))
    c[1].install(2, 0, members, [0])
    c[1].send(2, tag(), b"ahead")
    until(lambda: c[2].stats.messages_received == before + 2)
    assert not c[2].arrived(1, tag())
    c[2].install(2, 0, members, [0])
    slow.result(PATIENCE_S)
    assert c[2].receive(1, tag()).tobytes() == b"ahead"


def test_a_wait_of_an_earlier_era_is_called_off(cluster):
    c = cluster(2)
    waiting = c.blocked(0, lambda: c[0].receive(1, tag()))
    c.install([0, 1])
    with pytest.raises(Interrupted, match="epoch 1 attempt 0 is over"):
        waiting.result(PATIENCE_S)


def test_posts_end_with_their_era(cluster):
    c = cluster(2)
    place = np.zeros(4, np.uint8)
    c[1].post(0, tag(), place)
    c.install([0, 1])
    c[0].send(1, tag(), b"elsewhere")
    assert c[1].receive(0, tag()).tobytes() == b"elsewhere"
    assert not place.any()


def test_eras_do_not_go_back(cluster):
    c = cluster(2)
    with pytest.raises(LinkError, match="cannot follow"):
        c[0].install(0, 9, c.members([0, 1]), [1])


def test_peers_must_be_members(cluster):
    c = cluster(2)
    with pytest.raises(LinkError, match=r"\[1\] are no members"):
        c[0].install(2, 0, c.members([0]), [1])


@pytest.mark.parametrize("late", [0, 2])
def test_a_peer_that_does_not_come_is_named(cluster, late):
    c = cluster(3, installed=False)
    with pytest.raises(LinkError, match=rf"worker 1 has no link to workers \[{late}\]") as caught:
        c[1].install(1, 0, c.members([1, late]), [late], timeout_s=0.05)
    assert caught.value.peer == late


def test_a_peer_that_is_gone_is_found_out_at_once(cluster):
    c = cluster(3, installed=False)
    members = c.members([0, 1, 2])
    c[0].close()
    c[2].close()
    with pytest.raises(PeerLost, match="worker 0"):
        c[1].install(1, 0, members, [0], timeout_s=PATIENCE_S)
    if c.kind not in OVER_TCP:  # a listening side does not connect to another host only to check it
        with pytest.raises(PeerLost, match="worker 2"):
            c[1].install(2, 0, members, [2], timeout_s=PATIENCE_S)


def test_a_joined_peer_that_dies_ends_an_install_that_waits_for_another(cluster):
    c = cluster(3, installed=False)
    members = c.members([0, 1, 2])
    waiting = c.blocked(0, lambda: c[0].install(1, 0, members, [1, 2], timeout_s=PATIENCE_S))
    c[1].install(1, 0, members, [0])
    until(lambda: c[0]._links[1].joined == (1, 0))
    c[1].close()
    with pytest.raises(PeerLost, match="worker 1"):
        waiting.result(PATIENCE_S)


def test_an_interruption_ends_an_install_and_the_next_attempt_works(cluster):
    c = cluster(2)
    waiting = c.blocked(0, lambda: c[0].install(2, 0, c.members([0, 1]), [1]))
    c[0].interrupt(Interrupted("another failure"))
    with pytest.raises(Interrupted, match="another failure"):
        waiting.result(PATIENCE_S)
    c[0].resume()
    c.install([0, 1], (2, 1))
    exchange(c, [0, 1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(
        st.tuples(
            st.sets(st.integers(0, 3), min_size=1),
            st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=4),
            st.booleans(),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_any_sequence_of_edits_ends_in_working_links(kind, edits):
    """Members change, links are dropped at either end, messages of abandoned steps are under way."""
    c = Cluster(kind, range(4))
    try:
        for members, drops, noise in edits:
            c.install(sorted(members))
            exchange(c, sorted(members))
            for me, other in drops:
                if noise and other != me:
                    with contextlib.suppress(PeerLost):  # the other end may have dropped it before
                        c[me].send(other, tag(99), pattern(2_000_000))
                c[me].drop(other)
    finally:
        c.close()
