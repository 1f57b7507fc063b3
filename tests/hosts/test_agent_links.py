"""Tests the links of agents against strangers, in the clear and with TLS, and hosts that connect again before their old link is lost."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from elastic.agent import agent_link, follower
from elastic.agent.agent_link import AgentLink, AgentListener, dial, secret_of
from elastic.agent.follower import Follower
from elastic.agent.hosts import Hosts
from elastic.agent.loop import Loop
from elastic.agent.remote_carrier import RemoteCarrier
from elastic.agent.start import Sharing, Start
from elastic.comm.handshake import WrongSecret
from elastic.comm.job_certificate import job_credentials
from elastic.comm.streams import PlainStream, Stream
from elastic.comm.tls import Tls
from elastic.errors import LinkError
from elastic.host.facts import HostFacts
from elastic.settings import JobSettings
from tests.wire_tap import WireTap

JOB = b"the secret of a job"
SECRET = secret_of(JOB, "an agent")
TLS = Tls(job_credentials(JOB))


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture(params=["plain", "tls"])
def tls(request: pytest.FixtureRequest) -> Tls | None:
    return TLS if request.param == "tls" else None


@pytest.fixture
def listener(loop: Loop, tls: Tls | None) -> Iterator[AgentListener]:
    made = AgentListener(loop, SECRET, "127.0.0.1", tls)
    yield made
    made.close()


def until(loop: Loop, met: Callable[[], Any], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline
        loop.set_timer(0.01, lambda: None, "test")
        loop.turn()


@contextmanager
def tapped(address: tuple[str, int]) -> Iterator[WireTap]:
    tap = WireTap(address)
    try:
        yield tap
    finally:
        tap.close()


def heard(loop: Loop, sock: socket.socket) -> bytes:
    """What a stranger hears until his connection is closed."""
    data, over = bytearray(), list[bool]()

    def read() -> None:
        while not over:
            try:
                part = sock.recv(1000)
            except ConnectionResetError:
                part = b""
            data.extend(part)
            if not part:
                over.append(True)
                loop.post(lambda: None)

    sock.settimeout(10.0)
    reading = threading.Thread(target=read)
    reading.start()
    until(loop, lambda: over)
    reading.join()
    return bytes(data)


def connected(loop: Loop, listener: AgentListener, tls: Tls | None, address: tuple[str, int] | None = None) -> tuple[Stream, Stream]:
    """The two ends of a genuine connection."""
    came, reached = list[Stream](), list[Stream]()
    listener.connected = came.append
    dial(loop, SECRET, address or listener.address, reached.append, lambda error: pytest.fail(str(error)), tls=tls)
    until(loop, lambda: came and reached)
    return came[0], reached[0]


def closed(*streams: Stream) -> None:
    for stream in streams:
        stream.sock.close()


def test_long_messages_come_whole_both_ways_and_the_first_one_without_delay(loop: Loop, listener: AgentListener, tls: Tls | None) -> None:
    got: dict[str, list[Any]] = {"here": [], "there": []}
    links: list[AgentLink] = []

    def linked(name: str, stream: Stream) -> None:
        link = AgentLink(loop, stream, heard=got[name].append, lost=lambda why: pytest.fail(why))
        links.append(link)
        link.send({"type": "text", "first": name})
        link.send({"type": "text", "long": name * 500_000})

    listener.connected = lambda stream: linked("here", stream)
    dial(loop, SECRET, listener.address, lambda stream: linked("there", stream), lambda error: pytest.fail(str(error)), tls=tls)
    until(loop, lambda: all(len(each) == 2 for each in got.values()))
    for name, other in (("here", "there"), ("there", "here")):
        first, long = got[name]
        assert (first["first"], long["long"]) == (other, other * 500_000)
    for link in links:
        link.close()


def test_what_agents_tell_each_other_can_be_read_only_without_tls(loop: Loop, listener: AgentListener, tls: Tls | None) -> None:
    with tapped(listener.address) as tap:
        here, there = connected(loop, listener, tls, tap.address)
        got = list[Any]()
        links = [AgentLink(loop, stream, heard=got.append, lost=lambda _: None) for stream in (here, there)]
        links[0].send({"type": "text", "what": "the layout of the job"})
        until(loop, lambda: got)
        assert (b"the layout of the job" in tap.seen) == (tls is None)
        for link in links:
            link.close()


def test_who_decides_for_either_gets_what_the_other_agent_has(loop: Loop, listener: AgentListener, tls: Tls | None) -> None:
    came, reached = list[Stream](), list[Stream]()
    listener.connected = came.append
    dial(loop, SECRET, listener.address, reached.append, lambda error: pytest.fail(str(error)), tls=TLS, either=True)
    until(loop, lambda: came and reached)
    assert isinstance(reached[0], PlainStream) == isinstance(came[0], PlainStream) == (tls is None)
    closed(*came, *reached)


@pytest.mark.parametrize("tls", ["tls"], indirect=True)
def test_nobody_talks_two_agents_out_of_tls(loop: Loop, listener: AgentListener, tls: Tls | None) -> None:
    """He says to one that follows the other's choice that TLS is not used."""
    came, failed = list[Stream](), list[LinkError]()
    listener.connected = came.append
    with tapped(listener.address) as tap:
        tap.change = lambda data: data.replace(b"elastls2", b"elastic2")
        dial(loop, SECRET, tap.address, came.append, failed.append, tls=TLS, either=True)
        until(loop, lambda: failed)
    assert isinstance(failed[0], WrongSecret)
    assert not came


@pytest.mark.parametrize(
    "said",
    [b"GET / HTTP/1.1\r\n\r\n" * 9, bytes(300), b"\xff" * 4096, b"\x16\x03\x01\xff\xff" * 50],
    ids=["text", "zeros", "ones", "hello"],
)
def test_strangers_learn_a_random_number_and_that_they_are_wrong(loop: Loop, listener: AgentListener, said: bytes) -> None:
    listener.connected = lambda stream: pytest.fail("a stranger is let in")
    with socket.create_connection(listener.address) as stranger:
        stranger.sendall(said)
        answer = heard(loop, stranger)
    assert len(answer) in (40, 72)
    assert answer[:8] in (b"elastic2", b"elastls2")
    assert not any(answer[40:])


def test_a_handshake_that_was_recorded_is_worth_nothing(loop: Loop, listener: AgentListener, tls: Tls | None) -> None:
    sent: list[bytes] = []
    with tapped(listener.address) as tap:
        tap.change = lambda data: (sent.append(data), data)[1]
        closed(*connected(loop, listener, tls, tap.address))
    dialled = next(data for data in sent if not data.startswith((b"elastic2", b"elastls2")))
    assert len(dialled) == 72, "the dialler's ids, nonce and proof"
    listener.connected = lambda stream: pytest.fail("a recording is let in")
    with socket.create_connection(listener.address) as stranger:
        stranger.sendall(dialled)
        assert not any(heard(loop, stranger)[40:])


def test_a_handshake_cannot_be_led_to_another_agent_or_back_to_its_sender(loop: Loop, tls: Tls | None) -> None:
    """The dialler's own listener, at which it is led to itself, has a secret of its own, as any other agent's."""
    own = AgentListener(loop, secret_of(JOB, "the dialler"), "127.0.0.1", tls)
    own.connected = lambda stream: pytest.fail("it is let in")
    failed: list[LinkError] = []
    try:
        dial(loop, SECRET, own.address, lambda _: pytest.fail("it got through"), failed.append, tls=tls)
        until(loop, lambda: failed)
    finally:
        own.close()
    assert isinstance(failed[0], WrongSecret)


@pytest.mark.slow
@pytest.mark.parametrize("takes_part", [False, True])
def test_who_has_the_address_of_a_lost_coordinator_ends_no_host_that_takes_part(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, takes_part: bool
) -> None:
    """He refuses it. A host that has never taken part may have the wrong secret: it is told so after a while."""
    monkeypatch.setattr(follower, "_TURNED_AWAY_S", 0.1)
    monkeypatch.setattr(follower, "_AGAIN_S", 0.05)
    impostor = AgentListener(loop, b"he does not know it", "127.0.0.1")
    leader = SimpleNamespace(agent="lost", address=list(impostor.address))
    standing = SimpleNamespace(leader=leader, settled=True)
    session, probes = SimpleNamespace(standing=lambda: standing), SimpleNamespace(address=("", 0))
    etcd_thread = SimpleNamespace(run=lambda task: loop.post(lambda: task.done(task.call())))
    settings = JobSettings(name="job", workers=1, train_fn="m:f", isa="default", shared=True)
    sharing = Sharing(secret=JOB.hex(), interface="127.0.0.1")
    start = Start(settings=settings, directory="", environment={}, import_path=(), argv=(), modules={}, sharing=sharing)
    ended: list[dict[str, Any]] = []
    parts = (cast(Any, each) for each in (probes, session, etcd_thread, None, None))
    here = Follower(loop, start, "here", *parts, ended.append, None)
    here._crew = cast(Any, SimpleNamespace()) if takes_part else None
    began = time.monotonic()
    here.begin()
    until(loop, lambda: ended or (takes_part and time.monotonic() - began > 0.6))
    assert [each["kind"] for each in ended][:1] == ([] if takes_part else ["SettingsError"])
    assert takes_part or "another secret" in ended[0]["message"]
    loop.clear_timer("coordinator")
    impostor.close()


def test_who_has_proven_the_secret_does_not_give_way_to_strangers(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the middle of TLS's handshake, which takes longer."""
    monkeypatch.setattr(agent_link, "_WAITING", 2)
    listener = AgentListener(loop, SECRET, "127.0.0.1", TLS)
    came, reached = list[Stream](), list[Stream]()
    listener.connected = came.append
    with ExitStack() as stack:
        stack.callback(listener.close)
        dial(loop, SECRET, listener.address, reached.append, lambda error: pytest.fail(str(error)), tls=TLS)
        until(loop, lambda: any(greeting.proven for greeting in listener._greeting.values()))
        for _ in range(10):
            stack.enter_context(socket.create_connection(listener.address))
            listener._accept()
        until(loop, lambda: came and reached)
    closed(*came, *reached)


def test_strangers_who_hold_many_connections_keep_no_agent_out(loop: Loop, listener: AgentListener, tls: Tls | None) -> None:
    came: list[Stream] = []
    reached: list[Stream] = []
    listener.connected = came.append
    with ExitStack() as stack:
        strangers = [stack.enter_context(socket.create_connection(listener.address)) for _ in range(agent_link._WAITING)]
        until(loop, lambda: len(listener._greeting) == agent_link._WAITING)
        strangers += [stack.enter_context(socket.create_connection(listener.address)) for _ in range(9)]
        strangers[-1].sendall(b"GET / HTTP/1.1\r\n\r\n" * 9)
        dial(loop, SECRET, listener.address, reached.append, lambda error: pytest.fail(str(error)), tls=tls)
        until(loop, lambda: came and reached)
        assert len(listener._greeting) <= agent_link._WAITING
    closed(*came, *reached)


def test_a_connection_that_is_closed_for_another_one_in_the_same_turn_does_no_harm(
    loop: Loop, listener: AgentListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_link, "_WAITING", 1)
    with socket.create_connection(listener.address) as first:
        until(loop, lambda: listener._greeting)
        (greeting,) = listener._greeting.values()
        first.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with socket.create_connection(listener.address):
            listener._accept()
            greeting.on_event(0)  # it was found readable before it was closed
            until(loop, lambda: len(listener._greeting) == 1)
            assert greeting not in listener._greeting.values()


def test_a_host_that_comes_back_before_it_was_found_lost_stays() -> None:
    local = RemoteCarrier(None, "here", 1, 0, HostFacts(processors=1))
    before, after = (RemoteCarrier(None, "there", 2, 0, HostFacts(processors=1)) for _ in range(2))
    hosts = Hosts(local)
    hosts.add(before)
    hosts.fork(0, "there")
    hosts.add(after)
    hosts.fork(1, "there")
    hosts.remove(before)
    assert hosts.present == {"here": local, "there": after}
    assert hosts.room == 3
    assert [seen.worker for seen in hosts.look([0, 1])] == [1], "the workers of its earlier agent are gone"
