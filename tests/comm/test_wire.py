"""Tests the pure parts: headers, the handshake without a socket, payloads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from elastic.comm.handshake import Handshake
from elastic.comm.message import HEADER_BYTES, MessageHeader, Tag
from elastic.comm.rounds import decode, encode
from elastic.errors import LinkError
from elastic.memory.raw import as_bytes, empty

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
arrays = hnp.arrays(
    dtype=hnp.boolean_dtypes() | hnp.integer_dtypes(endianness="?") | hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
    shape=hnp.array_shapes(min_dims=0, min_side=0, max_side=5),
)


@given(st.tuples(u32, u32), st.builds(Tag, u32, u64, u32, u32, u32), st.integers(0, 2**40))
def test_headers_survive_packing(attempt_id, tag, size):
    header = MessageHeader(attempt_id=attempt_id, tag=tag, bytes=size)
    assert len(header.pack()) == HEADER_BYTES
    assert MessageHeader.unpack(header.pack()) == header


@pytest.mark.parametrize("tag", [Tag(-1, 0), Tag(1, 2**64), Tag(1, 0, 2**32)])
def test_a_tag_that_does_not_fit_is_refused(tag):
    with pytest.raises(LinkError, match="does not fit"):
        MessageHeader(attempt_id=(1, 0), tag=tag, bytes=0).pack()


@pytest.mark.parametrize("raw", [bytes(HEADER_BYTES), b"x" + MessageHeader(attempt_id=(1, 0), tag=Tag(1, 1), bytes=1).pack()[1:]])
def test_what_is_no_header_is_refused(raw):
    with pytest.raises(LinkError, match="not a message header"):
        MessageHeader.unpack(raw)


def test_an_absurd_size_is_refused():
    with pytest.raises(LinkError):
        MessageHeader.unpack(MessageHeader(attempt_id=(1, 0), tag=Tag(1, 1), bytes=2**50).pack())


@given(st.integers(1, 10_000))
def test_memory_is_aligned(size):
    memory = empty(size)
    assert memory.nbytes == size
    assert memory.ctypes.data % 64 == 0


@given(arrays)
def test_any_array_is_seen_as_its_bytes(array):
    assert as_bytes(array).tobytes() == array.tobytes()


def shake(dialer: Handshake, acceptor: Handshake, tamper: int | None = None) -> None:
    """Carries messages back and forth; flips one bit of the `tamper`th."""
    message, sides = acceptor.opening, [dialer, acceptor]
    for turn in range(3):
        if turn == tamper:
            message = message[:-1] + bytes([message[-1] ^ 1])
        assert len(message) == sides[turn % 2].expected
        message = sides[turn % 2].feed(message)
    assert message == b""


def test_a_handshake_ends_with_both_sides_known():
    dialer, acceptor = Handshake(secret=b"s", worker=7, peer=3), Handshake(secret=b"s", worker=3, peer=None)
    shake(dialer, acceptor)
    assert (dialer.peer, acceptor.peer, dialer.expected, acceptor.expected) == (3, 7, 0, 0)


@pytest.mark.parametrize(
    ("dialer", "acceptor"),
    [
        (Handshake(secret=b"s", worker=7, peer=3), Handshake(secret=b"t", worker=3, peer=None)),
        (Handshake(secret=b"s", worker=7, peer=3), Handshake(secret=b"s", worker=4, peer=None)),
    ],
    ids=["another secret", "another worker"],
)
def test_a_handshake_fails_with(dialer, acceptor):
    with pytest.raises(LinkError):
        shake(dialer, acceptor)


@pytest.mark.parametrize("tamper", [0, 1, 2])
def test_a_handshake_fails_if_any_message_was_changed(tamper):
    with pytest.raises(LinkError):
        shake(Handshake(secret=b"s", worker=7, peer=3), Handshake(secret=b"s", worker=3, peer=None), tamper)


def test_a_dialer_believes_only_the_acceptors_own_proof():
    dialer, acceptor = Handshake(secret=b"s", worker=7, peer=3), Handshake(secret=b"s", worker=3, peer=None)
    answer = dialer.feed(acceptor.opening)
    for forged in (answer[-32:], acceptor.refusal):  # its own proof sent back; a refusal
        with pytest.raises(LinkError):
            dialer.feed(forged)


def test_no_two_challenges_are_equal():
    assert Handshake(secret=b"s", worker=3, peer=None).opening != Handshake(secret=b"s", worker=3, peer=None).opening


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(), json_values, max_size=4), st.dictionaries(st.text(), arrays, max_size=3))
def test_payloads_survive_coding(value, named):
    message = np.concatenate([as_bytes(buffer) for buffer in encode((value, named))])
    aligned = empty(message.size)
    aligned[:] = message
    got, got_arrays = decode(aligned)
    assert got == value
    assert list(got_arrays) == list(named)
    for name, array in named.items():
        assert got_arrays[name].shape == array.shape
        assert got_arrays[name].tobytes() == array.astype(array.dtype.newbyteorder("<")).tobytes()
        assert got_arrays[name].ctypes.data % 64 == 0 or array.size == 0


def test_arrays_are_not_copied_by_coding():
    array = np.arange(1000.0)
    assert any(np.shares_memory(as_bytes(buffer), array) for buffer in encode(({}, {"x": array})))
    message = np.concatenate([as_bytes(buffer) for buffer in encode(({}, {"x": array}))])
    assert np.shares_memory(decode(message)[1]["x"], message)


@pytest.mark.parametrize("payload", [({"x": object()}, None), ({}, {"x": np.array([object()])}), ({}, {"x": np.array(["text"])})])
def test_what_cannot_travel_is_refused(payload):
    with pytest.raises(TypeError):
        encode(payload)


@pytest.mark.parametrize("cut", [0, 3, 40, 130])
def test_a_torn_payload_is_refused(cut):
    message = np.concatenate([as_bytes(buffer) for buffer in encode(({"a": 1}, {"x": np.arange(100.0)}))])
    with pytest.raises(LinkError, match="not a payload"):
        decode(message[:cut])
