"""The worker processes of this host: the fork server starts them, sockets and pidfds tell of them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from elastic import forkserver
from elastic.channel import Channel, Message
from elastic.loop import Loop
from elastic.supervision import Worker

_CLOSE_S = 5.0


class Crew:
    """Starts workers by number, and calls back in the loop's thread.

    `ready` is called once, when workers can be forked; `heard` with every message of a worker; `ended` when one is gone and reaped, after
    all that it had said; `broken` with the reason when there will be no more workers. Nothing is called back after `close`.
    """

    def __init__(
        self,
        loop: Loop,
        environment: Mapping[str, str],
        spec: Callable[[int], dict[str, Any]],
        *,
        ready: Callable[[], None],
        heard: Callable[[Worker, Message], None],
        ended: Callable[[Worker], None],
        broken: Callable[[str], None],
    ) -> None:
        self.workers: dict[int, Worker] = {}
        self._loop = loop
        self._spec = spec
        self._ready, self._heard, self._ended, self._broken = ready, heard, ended, broken
        self._standing: list[Message] = []
        self._closing = False
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = forkserver.start(environment, theirs.fileno())
        self._forks = Channel(ours)

    @property
    def forkserver(self) -> int:
        """Its pid."""
        return self._process.pid

    def listen(self) -> None:
        """Begins to act on what the fork server says."""
        self._loop.watch(self._forks, self._hear_forkserver)

    def fork(self, number: int) -> None:
        """Starts a worker; its number must be new."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        worker = Worker(number=number, channel=Channel(ours))
        self.workers[number] = worker
        self._set_interest(worker)
        with theirs:
            self._forks.send({"type": "fork", "worker": number, "spec": self._spec(number)}, [theirs.fileno()])
        for message in self._standing:
            self.tell([number], message)

    def freeze(self, modules: dict[str, Any]) -> None:
        """Has later workers run these modules (as `elastic.sources.to_json` has them) as they are now, whatever becomes of their files."""
        self._forks.send({"type": "freeze", "modules": modules})

    def tell(self, numbers: Iterable[int], message: Message) -> None:
        """Sends a message to each of these workers that still listens."""
        for number in numbers:
            worker = self.workers[number]
            if not worker.channel.closed:
                worker.channel.send(message)
                self._set_interest(worker)

    def tell_all(self, message: Message) -> None:
        """Sends a message to every worker, and to those that are started later."""
        self._standing.append(message)
        self.tell(self.workers, message)

    def kill(self, number: int, why: str) -> None:
        self.workers[number].kill(why)

    def close(self) -> None:
        """Ends all of them."""
        self._closing = True
        for worker in self.workers.values():
            worker.kill()
        self._loop.set_timer(_CLOSE_S, lambda: None, "close")
        # The fork server must live until it has reaped them all.
        while any(worker.status is None for worker in self.workers.values()) and not self._forks.closed and self._loop.timing("close"):
            self._loop.turn()
        self._process.kill()
        self._process.wait()

    def _hear_forkserver(self) -> None:
        for message in self._forks.receive():
            if message["type"] == "ready":
                if not self._closing:
                    self._ready()
            elif message["type"] == "forked":
                self._forked(self.workers[message["worker"]], message["pid"], message["fds"][0])
            elif message["type"] == "exited":
                worker = self.workers[message["worker"]]
                worker.status = message["status"]
                self._check_ended(worker)
            else:
                self._broken(f"the workers could not be started:\n{message['message']}")
        if self._forks.closed:
            self._loop.forget(self._forks)
            self._broken("the fork server, parent of the workers, died; the system may be out of memory")

    def _forked(self, worker: Worker, pid: int, pidfd: int) -> None:
        worker.pid, worker.pidfd = pid, pidfd
        if self._closing or worker.condemned:
            worker.kill()
        self._loop.watch(pidfd, lambda: self._gone(worker))

    def _set_interest(self, worker: Worker) -> None:
        """Waits for room as well, where a worker (stopped, perhaps) has not read what was sent."""
        self._loop.watch(worker.channel, lambda: self._hear_worker(worker), writable=worker.channel.unsent)

    def _hear_worker(self, worker: Worker) -> None:
        worker.channel.flush()
        for message in worker.channel.receive():
            self._hear(worker, message)
        if worker.channel.closed:
            self._loop.forget(worker.channel)
        else:
            self._set_interest(worker)

    def _hear(self, worker: Worker, message: Message) -> None:
        if not self._closing:
            self._heard(worker, message)

    def _gone(self, worker: Worker) -> None:
        self._loop.forget(worker.pidfd)
        for message in worker.channel.drain():
            self._hear(worker, message)
        worker.gone = True
        self._check_ended(worker)

    def _check_ended(self, worker: Worker) -> None:
        if worker.ended:
            os.close(worker.pidfd)
            if not worker.channel.closed:
                self._loop.forget(worker.channel)
            worker.channel.close()
            if not self._closing:
                self._ended(worker)
