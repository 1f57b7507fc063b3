"""Tests that the end of a connection is not taken for the end of the agent at its other end, nor of what it has in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from elastic.agent import absent
from elastic.agent.absent import AbsentAgents
from elastic.agent.agent_link import AgentListener, NobodyListens, secret_of
from elastic.agent.loop import Loop
from elastic.agent.remote_carrier import RemoteCarrier
from elastic.comm.tls import Tls
from elastic.errors import LinkError
from elastic.host.facts import HostFacts
from tests.hosts.test_agent_links import JOB, loop, tls, until

__all__ = ["loop", "tls"]


def turn(loop: Loop, times: int) -> None:
    for _ in range(times):
        loop.set_timer(0.002, lambda: None, "test")
        loop.turn()


class Asked:
    """Somebody listens where the agent `lost` did, which is asked for; `gone` has the hosts that are known to be gone."""

    def __init__(self, loop: Loop, tls: Tls | None, listens: str = "lost", *, closed: bool = False) -> None:
        self.listener, self.closed = AgentListener(loop, secret_of(JOB, listens), "127.0.0.1", tls), closed
        if closed:
            self.listener.close()
        self.present: dict[str, Any] = {}
        self.gone: list[str] = []
        self.agents = AbsentAgents(loop, JOB, tls, self.present, lambda host: self.gone.append(host.name))
        self.agents.ask(RemoteCarrier(None, "lost", 1, 0, HostFacts(processors=1)), self.listener.address)

    def __enter__(self) -> Asked:
        return self

    def __exit__(self, *_: object) -> None:
        self.agents.close()
        if not self.closed:
            self.listener.close()


def test_an_agent_that_still_listens_lives(loop: Loop, tls: Tls | None) -> None:
    with Asked(loop, tls) as asked:
        came: list[Any] = []
        asked.listener.connected = came.append
        until(loop, lambda: came)
        came[0].sock.close()
        turn(loop, 10)
        assert not asked.gone


def test_one_at_whose_address_nobody_listens_has_ended(loop: Loop) -> None:
    with Asked(loop, None, closed=True) as asked:
        until(loop, lambda: asked.gone)
        assert asked.gone == ["lost"]


def test_so_has_one_at_whose_address_another_agent_listens(loop: Loop, tls: Tls | None) -> None:
    with Asked(loop, tls, listens="another") as asked:
        until(loop, lambda: asked.gone)


@pytest.mark.parametrize("back", [False, True])
def test_one_that_says_nothing_is_asked_again_until_it_has_ended_or_is_back(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, back: bool
) -> None:
    dialled: list[object] = []

    def dial(loop: Loop, secret: bytes, address: Any, connected: Any, failed: Callable[[LinkError], None], **_: Any) -> Callable[[], None]:
        dialled.append(address)
        error = NobodyListens("refused") if len(dialled) == 5 else LinkError("no answer")
        loop.post(lambda: failed(error))
        return lambda: None

    monkeypatch.setattr(absent, "_AGAIN_S", 0.001)
    monkeypatch.setattr(absent, "dial", dial)
    with Asked(loop, None) as asked:
        until(loop, lambda: len(dialled) == 3)
        if back:
            asked.present["lost"] = True
            turn(loop, 10)
        else:
            until(loop, lambda: asked.gone)
        assert (len(dialled), asked.gone) == ((3, []) if back else (5, ["lost"]))
