"""Tests which agents are admitted to a job, and when."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic.agent.admissions import Admissions, hello
from elastic.agent.agent_link import AgentLink, AgentListener, dial, secret_of
from elastic.agent.loop import Loop
from elastic.agent.start import Sharing, Start
from elastic.comm.streams import Stream
from elastic.settings import JobSettings

SECRET = secret_of(b"the secret of a job", "an agent")


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def listener(loop: Loop) -> Iterator[AgentListener]:
    made = AgentListener(loop, SECRET, "127.0.0.1", None)
    yield made
    made.close()


def turn(loop: Loop, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        loop.set_timer(0.01, lambda: None, "test")
        loop.turn()


def test_a_host_that_knows_nothing_of_the_job_waits_until_a_takeover_is_over(loop: Loop, listener: AgentListener, tmp_path: Path) -> None:
    """It brings nothing that the takeover needs, and what it must know to go on with the job itself is told after that."""
    settings = JobSettings(name="job", workers=1, train_fn="m:f", isa="default", shared=True)
    start = Start(settings=settings, directory=str(tmp_path), environment={}, import_path=(), argv=(), modules={})
    sharing = Sharing(secret="5" * 64, interface="127.0.0.1")
    hosts = SimpleNamespace(present={}, local=SimpleNamespace(name="here"), room=1)
    coordinator: Any = SimpleNamespace(hosts=hosts, facts=None, agent_gone=None, unfounded=None)
    probes: Any = SimpleNamespace(address=listener.address, answer=lambda *_: None)
    admissions = Admissions(loop, start, sharing, coordinator, listener, probes, taking_over=True)
    heard: dict[bool, list[Any]] = {True: [], False: []}
    links = list[AgentLink]()
    for knows, told in heard.items():

        def connected(stream: Stream, told: list[Any] = told, knows: bool = knows) -> None:
            link = AgentLink(loop, stream, heard=told.append, lost=lambda _: None)
            links.append(link)
            link.send(hello(start, f"host-{knows}", ("127.0.0.1", 1), knows=knows))

        dial(loop, SECRET, listener.address, connected, lambda error: pytest.fail(str(error)), tls=None)
    turn(loop, 0.5)
    assert [(each["type"], each["keeps"]) for each in heard[True]] == [("welcome", True)]
    assert heard[False] == []
    admissions.resumes()
    turn(loop, 0.2)
    assert [(each["type"], each["keeps"]) for each in heard[False]] == [("welcome", False)]
    assert "host-True" in heard[False][0]["others"]
    for link in links:
        link.close()
    admissions.close({"type": "done"})
