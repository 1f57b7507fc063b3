from __future__ import annotations

import gc
import os
import socket
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.host.channel import Channel, encoded
from elastic.host.packed import Packed

JSON = st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)


def pair() -> tuple[Channel, Channel]:
    one, other = socket.socketpair()
    other.setblocking(False)
    return Channel(one), Channel(other)


@settings(max_examples=40)
@given(st.lists(st.dictionaries(st.text().filter(lambda key: key not in ("fds", "packed")), JSON, max_size=3), max_size=6))
def test_messages_arrive_as_sent_and_in_order(messages: list[dict[str, object]]) -> None:
    near, far = pair()
    for message in messages:
        near.send(message)
    near.close()
    assert far.drain() == [{**message, "fds": []} for message in messages]
    assert far.closed
    far.close()


@settings(max_examples=40)
@given(st.lists(st.tuples(st.dictionaries(st.sampled_from("abc"), JSON, max_size=2), JSON, st.booleans(), st.booleans()), max_size=5))
def test_packed_values_arrive_as_sent_and_are_passed_on_unread(sent: list[tuple[dict[str, object], object, bool, bool]]) -> None:
    near, far = pair()
    back, again = pair()
    for rest, value, within, compressed in sent:
        message = {**rest, "what": Packed(value, compressed=compressed)}
        near.send({"type": "tell", "message": message} if within else message)
    near.close()
    for message in far.drain():
        back.send({name: value for name, value in message.items() if name != "fds"})
    back.close()
    expected = [(rest, value) for rest, value, _, _ in sent]
    received = [message.get("message", message) for message in again.drain()]
    assert [({k: v for k, v in each.items() if k not in ("fds", "what")}, each["what"].value) for each in received] == expected
    far.close()
    again.close()


def test_a_packed_value_that_arrives_in_parts_is_waited_for() -> None:
    near, far = pair()
    other = Channel(socket.socket(fileno=os.dup(near.fileno())))
    text = encoded({"n": 1, "what": Packed(["x"] * 9)}) + encoded({"n": 2})
    for at in range(len(text)):
        assert far.receive() == []
        other.send_line(text[at : at + 1])
        if at in (len(text) - len(encoded({"n": 2})) - 1, len(text) - 1):
            assert [message["n"] for message in far.receive()] == [1 if at < len(text) - 1 else 2]
    for each in (near, other, far):
        each.close()


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


# Descriptors that wait


def fresh_file(content: bytes) -> int:
    fd = os.memfd_create("test")
    os.write(fd, content)
    return fd


def opened() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def no_leak() -> Iterator[None]:
    before = opened()
    yield
    assert opened() == before


def content_of(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        return file.read()


@pytest.mark.usefixtures("no_leak")
@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0, 10, 30_000, 300_000]), st.integers(0, 3)), max_size=12), st.booleans())
def test_descriptors_that_wait_for_a_reader_arrive_in_order(messages: list[tuple[int, int]], reads_early: bool) -> None:
    """Some messages are longer than what the kernel takes at once."""
    far, near = pair()  # `near` does not block
    far.sock.setblocking(False)
    received = []
    for number, (length, count) in enumerate(messages):
        fds = [fresh_file(f"{number}/{place}".encode()) for place in range(count)]
        near.send({"n": number, "text": "x" * length}, fds)
        for fd in fds:
            os.close(fd)
        if reads_early:
            received += far.receive()
    while near.unsent:
        received += far.receive()
        near.flush()
    near.close()
    received += far.drain()
    assert [(message["n"], len(message["text"])) for message in received] == [(n, length) for n, (length, _) in enumerate(messages)]
    for number, message in enumerate(received):
        assert [content_of(fd) for fd in message["fds"]] == [f"{number}/{place}".encode() for place in range(messages[number][1])]
    far.close()


@pytest.mark.usefixtures("no_leak")
@pytest.mark.parametrize("end", ["near closes", "far closes", "far closes before"])
def test_descriptors_of_messages_that_are_never_read_are_closed(end: str) -> None:
    far, near = pair()
    if end == "far closes before":
        far.close()
    fd = fresh_file(b"x")
    for _ in range(30):
        near.send({"text": "x" * 100_000}, [fd, fd])
    os.close(fd)
    assert near.unsent is (end != "far closes before")
    if end == "far closes":
        far.close()
        near.flush()
        assert not near.unsent
    near.close()
    far.close()


@pytest.mark.usefixtures("no_leak")
def test_descriptors_of_half_a_message_are_closed_with_the_channel() -> None:
    far, near = pair()
    far.sock.setblocking(False)
    fd = fresh_file(b"x")
    near.send({"text": "x" * 1_000_000}, [fd])
    os.close(fd)
    assert near.unsent
    assert far.receive() == []
    near.close()
    assert far.drain() == []
    far.close()


@pytest.mark.usefixtures("no_leak")
def test_as_many_descriptors_as_a_host_has_workers() -> None:
    far, near = pair()
    fd = fresh_file(b"x")
    near.send({}, [fd] * 250)
    os.close(fd)
    (message,) = far.receive()
    assert [content_of(each) for each in message["fds"]] == [b"x"] * 250
    near.close()
    far.close()
