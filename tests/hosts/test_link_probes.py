"""Tests the check of links between agents: both directions with their speed, and which one is broken."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from elastic.agent import link_probes
from elastic.agent.agent_link import Address, AgentLink, AgentListener, dial, secret_of
from elastic.agent.link_probes import LinkProbes, LinkReport
from elastic.agent.loop import Loop
from elastic.comm.job_certificate import job_credentials
from elastic.comm.streams import Stream
from elastic.comm.tls import Tls

JOB = b"a secret of thirty-two letters..."
TLS = Tls(job_credentials(JOB))


class Agents:
    """Agents in one loop, each with a listener of its own."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.listeners: list[AgentListener] = []
        self.probes: list[LinkProbes] = []

    def add(self, job: bytes = JOB, tls: Tls | None = None) -> LinkProbes:
        name = f"host-{len(self.probes)}"
        listener = AgentListener(self.loop, secret_of(job, name), "127.0.0.1", tls)
        probes = LinkProbes(self.loop, job, name, listener.address, tls)
        listener.connected = probes.accept
        self.listeners.append(listener)
        self.probes.append(probes)
        return probes

    def checked(self, probes: LinkProbes, others: dict[str, Address]) -> dict[str, LinkReport]:
        found: list[dict[str, LinkReport]] = []
        probes.check(others, found.append)
        self.loop.set_timer(30.0, lambda: pytest.fail("it never ended"), "never")
        while not found:
            self.loop.turn()
        return found[0]

    def close(self) -> None:
        for each in (*self.probes, *self.listeners):
            each.close()
        for name in list(self.loop._timers):
            self.loop.clear_timer(name)


@pytest.fixture
def agents() -> Iterator[Agents]:
    made = Agents()
    yield made
    made.close()


def closed_port() -> Address:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return "127.0.0.1", server.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("tls", [pytest.param(None, id="plain"), pytest.param(TLS, id="tls", marks=pytest.mark.long)])
def test_links_to_others_are_measured_in_both_directions_in_less_than_two_seconds(agents: Agents, tls: Tls | None) -> None:
    joiner, others = agents.add(tls=tls), [agents.add(tls=tls) for _ in range(3)]
    began = time.process_time()  # of all four agents together; other processes do not count
    found = agents.checked(joiner, {other._name: other.address for other in others})
    assert time.process_time() - began < 2.0
    assert found.keys() == {"host-1", "host-2", "host-3"}
    for link in found.values():
        assert link.back is not None
        assert min(link.there.rate or 0, link.back.rate or 0) > 0
        assert (link.there.why, link.back.why) == ("", "")


@pytest.mark.slow
def test_a_host_checks_some_links_at_a_time_and_sends_and_gets_little_over_each(agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_probes, "_ALL_BYTES", 2 << 20)
    joiner, others = agents.add(), [agents.add() for _ in range(20)]
    most, sent, send = [0], [0], AgentLink.send

    def counting(link: AgentLink, message: dict[str, Any]) -> None:
        most[0], sent[0] = max(most[0], len(joiner._probes)), sent[0] + len(message.get("data", ""))
        send(link, message)

    monkeypatch.setattr(AgentLink, "send", counting)
    found = agents.checked(joiner, {other._name: other.address for other in others})
    assert len(found) == 20
    assert all(link.there.rate and link.back is not None and link.back.rate for link in found.values())
    assert 0 < most[0] <= link_probes._AT_ONCE
    assert sent[0] <= 40 * (1 << 16), "one small burst in each direction, not megabytes"


@pytest.mark.slow
def test_a_connection_that_ends_before_anything_got_through_is_tried_again(agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of an agent that is so busy that it takes the other one for silent."""
    monkeypatch.setattr(link_probes, "_AGAIN_S", 0.01)
    joiner, other, accepted = agents.add(), agents.add(), list[Stream]()

    def accept(stream: Stream) -> None:
        accepted.append(stream)
        stream.sock.close() if len(accepted) < 3 else other.accept(stream)

    agents.listeners[1].connected = accept
    link = agents.checked(joiner, {"host-1": other.address})["host-1"]
    assert len(accepted) == 3
    assert link.back is not None
    assert (link.there.why, link.back.why) == ("", "")
    agents.listeners[1].connected = lambda stream: stream.sock.close()
    assert "ended" in agents.checked(joiner, {"host-1": other.address})["host-1"].there.why


def test_without_others_there_is_nothing_to_check(agents: Agents) -> None:
    assert agents.checked(agents.add(), {}) == {}


@pytest.mark.slow
def test_an_agent_that_is_not_there_or_that_cannot_dial_back_is_told_apart(agents: Agents) -> None:
    joiner, other = agents.add(), agents.add()
    found = agents.checked(joiner, {"gone": closed_port()})["gone"]
    assert (found.there.why, found.there.rate, found.back) == ("Connection refused", None, None)
    joiner.address = closed_port()  # as behind a firewall that lets nobody in
    found = agents.checked(joiner, {"host-1": other.address})["host-1"]
    assert found.back is not None
    assert (found.there.why, found.back.why, found.back.rate) == ("", "Connection refused", None)
    assert (found.there.rate or 0) > 0


@pytest.mark.slow
def test_an_agent_that_accepts_and_says_nothing_is_given_up(agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_probes, "_LIMIT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        found = agents.checked(agents.add(), {"mute": ("127.0.0.1", mute.getsockname()[1])})["mute"]
    assert found.there.why == "no connection for 0.3 s"


@pytest.mark.slow
def test_an_agent_with_another_secret_is_not_reached(agents: Agents) -> None:
    joiner, stranger = agents.add(), agents.add(b"another secret of many letters...")
    found = agents.checked(joiner, {"host-1": stranger.address})["host-1"]
    assert "another secret" in found.there.why


@pytest.mark.parametrize("theirs", [None, TLS], ids=["plain", "tls"])
def test_an_agent_is_not_reached_if_only_one_of_both_uses_tls(agents: Agents, monkeypatch: pytest.MonkeyPatch, theirs: Tls | None) -> None:
    monkeypatch.setattr(link_probes, "_AGAIN_S", 0.01)
    joiner, other = agents.add(tls=None if theirs else TLS), agents.add(tls=theirs)
    found = agents.checked(joiner, {"host-1": other.address})["host-1"]
    assert "give every host of the job the same --tls" in found.there.why


@pytest.mark.slow
def test_what_is_no_probe_is_not_answered(agents: Agents) -> None:
    """A follower closes the connection of an agent that takes it for the coordinator."""
    other, lost = agents.add(), list[str]()

    def connected(stream: Stream) -> None:
        AgentLink(agents.loop, stream, heard=lambda _: pytest.fail("it was answered"), lost=lost.append).send({"type": "hello"})

    dial(agents.loop, secret_of(JOB, "host-0"), other.address, connected, lambda error: lost.append(str(error)))
    while not lost:
        agents.loop.turn()
    assert lost == ["its connection ended"]
