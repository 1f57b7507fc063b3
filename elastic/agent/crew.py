"""The worker processes of this host: the fork server starts them; sockets deliver their messages, pidfds their ends."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from elastic.agent import forkserver
from elastic.agent.loop import Loop
from elastic.agent.segments import Segments
from elastic.agent.supervision import WorkerProcess
from elastic.host.channel import MAPPED, Channel, Message, encoded
from elastic.host.process import is_stopped
from elastic.observe.console import say


@dataclass(slots=True, kw_only=True)
class ForkedWorker(WorkerProcess):
    """A worker of this host, with its connection."""

    channel: Channel


_CLOSE_S = 5.0
_MEASURE_S = 10.0
_ANSWER_S = 5.0  # how long the fork server may take to start a worker, or to report an exit status
_GIVEN_UP_AFTER = 2  # after so many times that, a worker's exit status is not waited for any more


class Crew:
    """Starts workers by number, and calls back in the loop's thread.

    `spec` makes the WorkerSpec, as JSON, of a worker from its number and its role.

    `ready` is called once, when workers can be forked; `heard` with every message of a worker; `ended` when a worker is gone and reaped,
    after its last message; `broken` with the reason when no more workers can be started, and whether the fork server
    has died. Nothing is called back after `close`.
    """

    def __init__(
        self,
        loop: Loop,
        environment: Mapping[str, str],
        spec: Callable[..., dict[str, Any]],
        *,
        segments: Segments,
        ready: Callable[[], None],
        heard: Callable[[WorkerProcess, Message], None],
        ended: Callable[[WorkerProcess], None],
        broken: Callable[[str, bool], None],
    ) -> None:
        self.workers: dict[int, ForkedWorker] = {}
        self._loop = loop
        self._spec = spec
        self.segments = segments
        self._ready, self._heard, self._ended, self._broken = ready, heard, ended, broken
        self._standing: list[Message] = []
        self._closing = self._began = False
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = forkserver.start(environment, theirs.fileno())
        self._forks = Channel(ours)

    @property
    def forkserver(self) -> int:
        """The fork server's pid."""
        return self._process.pid

    def listen(self) -> None:
        """Begins to act on the fork server's messages."""
        self._loop.watch(self._forks, self._hear_forkserver)

    def fork(self, number: int, *, first: bool = False, joins: bool = True, workers: int | None = None) -> None:
        """Starts a worker; its number must be new. `first` and `joins` are as in `WorkerSpec`; `workers` is the number that the job was
        founded with, None if that is this host's."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        worker = ForkedWorker(number=number, slot=self._free_slot(), channel=Channel(ours))
        self.workers[number] = worker
        self._set_interest(worker)
        self._process.send_signal(signal.SIGCONT)  # in case it is stopped: a long message would not fit into the socket
        segment = self.segments.create(number)
        with theirs:
            fds = [theirs.fileno()] if segment is None else [theirs.fileno(), segment]
            spec = self._spec(number, slot=worker.slot, first=first, joins=joins, workers=workers)
            self._forks.send({"type": "fork", "worker": number, "spec": spec}, fds)
        for message in self._standing:
            self.tell([number], message)
        self._await_forkserver(0)

    def _free_slot(self) -> int:
        taken = {worker.slot for worker in self.workers.values() if not worker.ended}
        return next(slot for slot in range(len(taken) + 1) if slot not in taken)

    def measure(self, threads: int, heard: Callable[[dict[str, Any]], None]) -> None:
        """Checks how this host computes, with so many threads. `heard` gets the result of `worker.node_check`, `{"broken": why}` if the
        process ended without one, and `{}` if it takes too long."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        channel = Channel(ours)
        with theirs:
            self._forks.send({"type": "check", "threads": threads}, [theirs.fileno()])

        def end(found: dict[str, Any]) -> None:
            self._loop.clear_timer("measure")
            self._loop.forget(channel)
            channel.close()
            if not self._closing:
                heard({name: value for name, value in found.items() if name != "fds"})

        def hear() -> None:
            found = channel.receive()
            if found or channel.closed:
                end(found[0] if found else {"broken": "its process ended without a result"})

        self._loop.watch(channel, hear)
        self._loop.set_timer(_MEASURE_S, lambda: end({}), "measure")

    def freeze(self, modules: dict[str, Any]) -> None:
        """Makes later workers run these modules (from `script.sources.to_json`) in their present state, even if their files change."""
        self._forks.send({"type": "freeze", "modules": modules})

    def tell(self, numbers: Iterable[int], message: Message, segments: Iterable[int] = ()) -> None:
        """Sends a message to each of these workers that still listens, with the segments of the workers `segments`."""
        shared = self.segments.descriptors(segments)
        line = encoded(message)
        for number in numbers:
            worker = self.workers[number]
            if worker.channel.closed:
                continue
            others = {each: fd for each, fd in shared.items() if each != number}
            if others:
                worker.channel.send({**message, MAPPED: [*others]}, [*others.values()])
            else:
                worker.channel.send_line(line)
            self._set_interest(worker)

    def tell_all(self, message: Message) -> None:
        """Sends a message to every worker, also to those that are started later."""
        self._standing.append(message)
        self.tell(self.workers, message)

    def kill(self, number: int, why: str) -> None:
        self.workers[number].kill(why)

    def close(self) -> None:
        """Ends all workers and the fork server."""
        self._closing = True
        for worker in self.workers.values():
            worker.kill()
        self._process.send_signal(signal.SIGCONT)  # in case it is stopped
        self._loop.set_timer(_CLOSE_S, lambda: None, "close")
        # The fork server must live until it has reaped all workers.
        waiting = lambda: any(worker.status is None and not worker.unreaped for worker in self.workers.values())  # noqa: E731
        while waiting() and not self._forks.closed and self._loop.timing("close"):
            self._loop.turn()
        self._process.kill()
        self._process.wait()

    def _hear_forkserver(self) -> None:
        for message in self._forks.receive():
            if message["type"] == "ready":
                self._began = True
                if not self._closing:
                    self._ready()
            elif message["type"] == "forked":
                self._forked(self.workers[message["worker"]], message["pid"], message["fds"][0])
            elif message["type"] == "exited":
                worker = self.workers[message["worker"]]
                worker.status = message["status"]
                if not worker.unreaped:
                    self._check_ended(worker)
            else:
                self._broken(f"the workers could not be started:\n{message['message']}", False)
        if self._forks.closed:
            self._loop.forget(self._forks)
            self._broken("the fork server, parent of the workers, died; the system may be out of memory", True)

    def _forked(self, worker: ForkedWorker, pid: int, pidfd: int) -> None:
        worker.pid, worker.pidfd = pid, pidfd
        if self._closing or worker.condemned:
            worker.kill()
        self._loop.watch(pidfd, lambda: self._gone(worker))

    def _set_interest(self, worker: ForkedWorker) -> None:
        """Watches a worker's socket, also for room if a worker (perhaps stopped) has not read all messages."""
        self._loop.watch(worker.channel, lambda: self._hear_worker(worker), writable=worker.channel.unsent)

    def _hear_worker(self, worker: ForkedWorker) -> None:
        worker.channel.flush()
        for message in worker.channel.receive():
            self._hear(worker, message)
        if worker.channel.closed:
            self._loop.forget(worker.channel)
        else:
            self._set_interest(worker)

    def _hear(self, worker: ForkedWorker, message: Message) -> None:
        if not self._closing:
            self._heard(worker, message)

    def _gone(self, worker: ForkedWorker) -> None:
        self._loop.forget(worker.pidfd)
        for message in worker.channel.drain():
            self._hear(worker, message)
        worker.gone = True
        self._check_ended(worker)
        self._await_forkserver(0)

    def _await_forkserver(self, waited: int) -> None:
        """Sets a timer for the fork server's answer, after `waited` such times; then a stopped one is continued."""
        if not self._closing and not self._forks.closed and not (waited == 0 and self._loop.timing("forks")):
            self._loop.set_timer(_ANSWER_S, lambda: self._ask_forkserver(waited + 1), "forks")

    def _ask_forkserver(self, waited: int) -> None:
        unreaped = [worker for worker in self.workers.values() if worker.gone and not worker.ended]
        unborn = [worker.number for worker in self.workers.values() if worker.pid is None]
        if not self._began or not (unreaped or unborn):
            return
        stopped = is_stopped(self._process.pid)
        if waited == (1 if stopped else _GIVEN_UP_AFTER):
            what = "was stopped and is continued now" if stopped else f"has not answered for {waited * _ANSWER_S:g} s"
            say(f"the fork server (process {self._process.pid}), which starts workers and reports how they end, {what}")
        self._process.send_signal(signal.SIGCONT)
        for worker in unreaped if waited >= _GIVEN_UP_AFTER else ():
            worker.unreaped = True
            self._check_ended(worker)
        self._await_forkserver(waited)

    def _check_ended(self, worker: ForkedWorker) -> None:
        if worker.ended:
            os.close(worker.pidfd)
            self._loop.forget(worker.channel)  # not done yet if `_gone` read its end
            worker.channel.close()
            if not self._closing:
                self._ended(worker)
