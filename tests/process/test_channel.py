from __future__ import annotations

import os
import socket
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.host.channel import Channel

JSON = st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)


def pair() -> tuple[Channel, Channel]:
    one, other = socket.socketpair()
    other.setblocking(False)
    return Channel(one), Channel(other)


@settings(max_examples=40)
@given(st.lists(st.dictionaries(st.text().filter(lambda key: key != "fds"), JSON, max_size=3), max_size=6))
def test_messages_arrive_as_sent_and_in_order(messages: list[dict[str, object]]) -> None:
    near, far = pair()
    for message in messages:
        near.send(message)
    near.close()
    assert far.drain() == [{**message, "fds": []} for message in messages]
    assert far.closed
    far.close()


def test_descriptors_stay_with_their_message() -> None:
    near, far = pair()
    pipes = [os.pipe() for _ in range(3)]
    near.send({"n": 0})
    near.send({"n": 1}, [pipes[0][1], pipes[1][1]])
    near.send({"n": 2})
    near.send({"n": 3}, [pipes[2][1]])
    received = far.drain()
    assert [(message["n"], len(message["fds"])) for message in received] == [(0, 0), (1, 2), (2, 0), (3, 1)]
    for (read, write), fd in zip(pipes, [*received[1]["fds"], *received[3]["fds"]], strict=True):
        os.close(write)
        assert not os.get_inheritable(fd)
        os.write(fd, b"x")
        os.close(fd)
        assert os.read(read, 2) == b"x"
        os.close(read)
    near.close()
    far.close()


def test_a_reader_that_does_not_read_does_not_hold_the_sender_up() -> None:
    far, near = pair()
    text = "x" * (1 << 22)
    near.send({"text": text})
    assert near.unsent
    received: list[dict[str, object]] = []
    while not received:
        received = far.receive()
        near.flush()
    assert received == [{"text": text, "fds": []}]
    assert not near.unsent
    near.close()
    far.close()


def test_sending_to_nobody_is_no_error_and_receiving_says_closed() -> None:
    near, far = pair()
    far.close()
    near.send({"n": 1})
    near.send({"n": 2}, [0])
    assert near.receive() == []
    assert near.closed
    near.close()


def test_half_a_message_is_kept_until_the_rest_comes() -> None:
    one, other = socket.socketpair()
    channel = Channel(other)
    one.sendall(b'{"n"')
    assert channel.receive() == []
    one.sendall(b': 1}\n{"n": 2}\n{')
    assert [message["n"] for message in channel.receive()] == [1, 2]
    one.close()
    assert channel.receive() == []
    assert channel.closed
    channel.close()


def test_a_long_message_is_searched_and_copied_once() -> None:
    one, other = socket.socketpair()
    channel, pieces = Channel(other), 4096
    started = time.process_time()
    received: list[dict[str, object]] = []
    one.sendall(b'{"text": "')
    for _ in range(pieces):
        one.sendall(b"x" * 4096)
        received += channel.receive()
    one.sendall(b'"}\n')
    while not received:
        received = channel.receive()
    assert received == [{"text": "x" * (pieces * 4096), "fds": []}]
    assert time.process_time() - started < 3.0, "16 MiB in 4,096 reads: 70 GB are copied if each read copies what has come so far"
    one.close()
    channel.close()
