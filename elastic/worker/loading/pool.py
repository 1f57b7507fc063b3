"""The worker's end of its loader processes: starts them, asks them for micro-batches, and replaces those that die."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

from elastic.errors import TrainerError
from elastic.host import signals
from elastic.host.channel import Channel, Message, close_all
from elastic.host.process import module_command, tied_command
from elastic.memory import parcel
from elastic.memory.parcel import Parcel
from elastic.worker.loading.server import Program

Key = tuple[int, int]
"""A step and a micro-batch."""


@dataclass(slots=True)
class _Loader:
    """A loader process. It has begun when it can load; `asked` are the keys that it was asked for, in order."""

    channel: Channel
    begun: bool = False
    asked: list[Key] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Whether a process has loaded a micro-batch, and that; or the traceback of its error, if it raised one."""

    found: bool = False
    contents: Any = None
    error: str | None = None


class Pool:
    """Loader processes. What they have loaded is kept until it is taken or dropped.

    `deaths` counts those that ended by themselves. What such a process was asked for is forgotten.
    """

    def __init__(self, code: Parcel, processes: int) -> None:
        self._code = code
        self._program = Parcel.of(Program.own(with_main=b"__main__" in code.pickled or b"__mp_main__" in code.pickled))
        self._count = processes
        self._loaders: dict[int, _Loader] = {}
        self._loaded: dict[Key, tuple[int, list[int]]] = {}
        self._failures: dict[Key, str] = {}
        self._server: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self.deaths = 0

    def start(self) -> None:
        """Starts the fork server, and asks it for the processes; waits for nothing."""
        mine, theirs = socket.socketpair()
        with theirs, signals.shielded():
            command = module_command("elastic.worker.loading.server", str(theirs.fileno()))
            self._server = subprocess.Popen(tied_command(command), pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self._channel = Channel(mine)
        self._send_code(self._channel)
        for number in range(self._count):
            self._fork(number)

    def _send_code(self, channel: Channel) -> None:
        program, program_sizes = self._program.written()
        code, sizes = self._code.written()
        channel.send({"type": "code", "sizes": sizes, "program_sizes": program_sizes}, [program, code])
        close_all([program, code])

    def _fork(self, number: int) -> None:
        assert self._channel is not None  # it was started
        mine, theirs = socket.socketpair()
        with theirs:
            self._channel.send({"type": "fork", "number": number}, [theirs.fileno()])
        self._loaders[number] = _Loader(Channel(mine))

    @property
    def outstanding(self) -> set[Key]:
        """What processes load now, and what they have loaded."""
        return self._asked | set(self._loaded) | set(self._failures)

    @property
    def _asked(self) -> set[Key]:
        return {key for loader in self._loaders.values() for key in loader.asked}

    def ask(self, key: Key, most: int) -> bool:
        """Asks the process with least to do, if it has less than `most`. Returns whether there was one."""
        free = [loader for loader in self._loaders.values() if loader.begun and len(loader.asked) < most]
        if not free:
            return False
        least = min(free, key=lambda loader: len(loader.asked))
        least.asked.append(key)
        least.channel.send({"type": "load", "step": key[0], "micro_batch": key[1]})
        return True

    def drop(self, key: Key) -> None:
        """Forgets what was loaded for a key. What is still being loaded stays."""
        if key in self._loaded:
            os.close(self._loaded.pop(key)[0])
        self._failures.pop(key, None)

    def take(self, key: Key, timeout_s: float) -> Answer:
        """Waits until a process has answered, if one was asked to load this.

        Raises:
            TrainerError: if it takes longer than `timeout_s`, unless that is 0.
        """
        deadline = time.monotonic() + timeout_s
        while key in self._asked:
            rest = deadline - time.monotonic()
            if timeout_s and rest <= 0:
                raise TrainerError(
                    f"a process of the DataLoader has not loaded micro-batch {key[1]} of step {key[0]} within its timeout={timeout_s:g} "
                    "seconds: give it a longer timeout or more num_workers, or num_workers=0 to see where the dataset waits"
                )
            self.hear(rest if timeout_s else None)
        if key not in self._loaded:
            return Answer(error=self._failures.pop(key, None))
        descriptor, sizes = self._loaded.pop(key)
        try:
            return Answer(found=True, contents=parcel.opened(descriptor, sizes))
        finally:
            os.close(descriptor)

    def hear(self, wait_s: float | None = 0.0) -> None:
        """Takes what processes have sent, after waiting for at most so long (for ever, if None); replaces those that have ended."""
        channels = {loader.channel.fileno(): loader for loader in self._loaders.values()}
        poll = select.poll()
        for descriptor in [*channels, *self._of_server()]:
            poll.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(None if wait_s is None else 1000 * wait_s)}
        if not ready.issubset(channels):  # first: with the server end all others, which is one death
            self._hear_server()
        for loader in [channels[descriptor] for descriptor in ready.intersection(channels)]:
            if not loader.channel.closed:
                self._hear(loader)

    def _of_server(self) -> Iterator[int]:
        if self._channel is not None:
            yield self._channel.fileno()

    def _hear(self, loader: _Loader) -> None:
        for message in loader.channel.receive():
            if message["type"] == "begun":
                loader.begun = True
                continue
            if message["type"] == "broken":
                self._refuse(message)
            key = (message["step"], message["micro_batch"])
            loader.asked.remove(key)
            self.drop(key)
            if message["type"] == "loaded":
                self._loaded[key] = message["fds"][0], message["sizes"]
            else:
                self._failures[key] = message["error"]
        if loader.channel.closed:
            number = next(number for number, each in self._loaders.items() if each is loader)
            loader.channel.close()
            del self._loaders[number]
            self.deaths += 1
            self._fork(number)

    def _hear_server(self) -> None:
        assert self._channel is not None
        for message in self._channel.receive():
            if message["type"] == "broken":
                self._refuse(message)
        if self._channel.closed:
            self.deaths += 1
            self.close(keep_loaded=True)
            self.start()

    def close(self, keep_loaded: bool = False) -> None:
        """Ends all processes, and waits for the fork server's end."""
        for loader in self._loaders.values():
            loader.channel.close()
        self._loaders.clear()
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._server is not None:
            self._server.kill()  # and the kernel its children
            with suppress(ChildProcessError):
                self._server.wait()
            self._server = None
        if not keep_loaded:
            for key in [*self._loaded, *self._failures]:
                self.drop(key)

    def _refuse(self, message: Message) -> NoReturn:
        self.close()
        raise TrainerError(
            "the DataLoader's dataset, collate_fn or worker_init_fn cannot be used in another process, as num_workers needs. Define them "
            'in a module that can be imported; a script must have what starts the training under `if __name__ == "__main__":`. Or use '
            f"num_workers=0. The error there:\n{message['error']}"
        )
