"""Tests the agent's table of workers, with a fake fork server."""

from __future__ import annotations

import os
import socket
from typing import Any

from elastic.agent.crew import Crew
from elastic.agent.loop import Loop
from elastic.agent.segments import Segments
from elastic.host.channel import Channel


class _ForkServer:
    pid = 1

    def send_signal(self, number: int) -> None:
        pass


def crew_of(loop: Loop, heard: list[Any], monkeypatch: Any) -> tuple[Crew, socket.socket]:
    """A crew, and the fork server's end of its connection."""
    ends: list[socket.socket] = []

    def start(_: Any, fd: int) -> _ForkServer:
        ends.append(socket.socket(fileno=os.dup(fd)))
        return _ForkServer()

    monkeypatch.setattr("elastic.agent.forkserver.start", start)
    crew = Crew(
        loop,
        {},
        lambda number, **role: {},
        segments=Segments(wanted=False),
        ready=lambda: None,
        heard=lambda worker, message: heard.append((worker.number, message["type"])),
        ended=lambda worker: heard.append((worker.number, "ended")),
        broken=lambda why, died: heard.append((why, died)),
    )
    return crew, ends[0]


def test_a_new_worker_is_heard_on_the_descriptor_of_a_dead_one(monkeypatch: Any) -> None:
    """The end of its connection was read when its pidfd told of its death, and the number went on to be taken for watched."""
    loop, heard = Loop(), list[Any]()
    crew, server = crew_of(loop, heard, monkeypatch)
    forks = Channel(server)
    crew.fork(0)
    first = crew.workers[0]
    descriptor = first.channel.fileno()
    socket.socket(fileno=forks.receive()[-1]["fds"][0]).close()  # the worker dies
    pidfd, other = os.pipe()
    os.close(other)
    crew._forked(first, 2, pidfd)
    first.status = -9
    crew._gone(first)  # before the loop reports its connection
    assert heard == [(0, "ended")]
    crew.fork(1)
    second = crew.workers[1]
    assert second.channel.fileno() == descriptor, "the case that is tested"
    with socket.socket(fileno=forks.receive()[-1]["fds"][0]) as worker:
        worker.sendall(b'{"type": "announce"}\n')
        loop.set_timer(1.0, lambda: None)
        loop.turn()
    assert heard[1:] == [(1, "announce")]
    for channel in (second.channel, forks, crew._forks):
        channel.close()
