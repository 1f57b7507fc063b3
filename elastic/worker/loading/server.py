"""The processes that load for a worker: a fork server that gets the worker's data set once, and the loader processes that it forks.

The fork server exists because a worker has threads, and only a single-threaded process can be forked safely. The data set lies in memory
that all of them share. Each process asks the kernel to be killed with the one that started it, so none outlives the worker.

    worker -> server    code {sizes, program_sizes}, with two parcels | fork {number}, with the loader's end of a socket
    server -> worker    ready {} | broken {error}
    worker -> loader    load {step, micro_batch}
    loader -> worker    begun {} | broken {error} | loaded {step, micro_batch, sizes}, with a parcel | failed {step, micro_batch, error}
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data._utils import worker as torch_worker

from elastic.engine.data import Batch
from elastic.host import signals
from elastic.host.channel import Channel, Message, close_all
from elastic.host.process import default_children, die_with_parent, name_process
from elastic.memory import parcel
from elastic.memory.parcel import Parcel
from elastic.script import sources, target


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What a process needs to import the worker's modules: `main` is the script, None if nothing in it is needed."""

    path: list[str]
    argv: list[str]
    modules: Mapping[str, tuple[str, str, bool, bytes]]
    main: str | None

    @classmethod
    def own(cls, *, with_main: bool) -> Program:
        """Returns this process's."""
        main = getattr(sys.modules["__main__"], "__file__", None) if with_main else None
        path = [entry for entry in sys.path if isinstance(entry, str)]
        return cls(path=path, argv=[*sys.argv], modules=sources.contents(), main=None if main is None else os.path.abspath(main))

    def prepare(self) -> None:
        """Prepares this process to unpickle what a process with this program has pickled."""
        sys.path[:], sys.argv[:] = self.path, self.argv
        sources.keep(self.modules)
        if self.main is not None:
            target.load_main(self.main)


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """What loader processes run, and the settings of the worker on which bits may depend."""

    load: Batch
    init: Callable[[int], Any] | None
    dataset: Any
    processes: int
    threads: int
    dtype: torch.dtype


def main() -> None:
    """Runs the fork server, which dies with the worker; argv is the socket's descriptor."""
    name_process("elastic-loader")
    signals.outlive()
    default_children()
    channel = Channel.adopt(int(sys.argv[1]))
    code: Code | None = None
    while not channel.closed:
        messages = deque(channel.receive())
        while messages:
            message = messages.popleft()
            if message["type"] == "code":
                code = _received(channel, message)
            elif code is not None:
                _fork(channel, message, code, messages)
        _reap()


def _received(channel: Channel, message: Message) -> Code | None:
    """Imports what the worker's objects need, and unpickles them."""
    try:
        _opened(message["fds"][0], message["program_sizes"]).prepare()
        code = _opened(message["fds"][1], message["sizes"])
        torch.set_num_threads(code.threads)
        torch.set_default_dtype(code.dtype)
    except BaseException:  # the process boundary: modules of the user's may raise anything, also SystemExit
        channel.send({"type": "broken", "error": traceback.format_exc()})
        return None
    channel.send({"type": "ready"})
    return code


def _opened(descriptor: int, sizes: list[int]) -> Any:
    try:
        return parcel.opened(descriptor, sizes)
    finally:
        os.close(descriptor)


def _fork(channel: Channel, message: Message, code: Code, later: Iterable[Message]) -> None:
    (descriptor,), server = message["fds"], os.getpid()
    if os.fork():
        os.close(descriptor)
        return
    try:
        die_with_parent(server)
        channel.close()
        for each in later:  # else the worker would not see the end of the processes that get these
            close_all(each["fds"])
        _load_until_closed(Channel.adopt(descriptor), code, message["number"])
    finally:
        os._exit(0)  # what the server would do at its end is not this process's


def _reap() -> None:
    with suppress(ChildProcessError):  # there is none
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _load_until_closed(channel: Channel, code: Code, number: int) -> None:
    name_process(f"elastic-load{number}")
    for each in signals.STOPPING:
        signal.signal(each, signal.SIG_IGN)
    seed = torch.initial_seed()
    info = torch_worker.WorkerInfo(id=number, num_workers=code.processes, seed=seed, dataset=code.dataset)
    torch_worker._worker_info = info  # pyright: ignore[reportAttributeAccessIssue] get_worker_info() returns it
    try:
        if code.init is not None:
            code.init(number)
    except Exception:  # the process boundary
        channel.send({"type": "broken", "error": traceback.format_exc()})
        return
    channel.send({"type": "begun"})
    while not channel.closed:
        for message in channel.receive():
            _answer(channel, code.load, message["step"], message["micro_batch"])


def _answer(channel: Channel, load: Batch, step: int, micro_batch: int) -> None:
    key = {"step": step, "micro_batch": micro_batch}
    try:
        descriptor, sizes = Parcel.of(load(step, micro_batch)).written()
    except Exception:  # the worker loads it itself, and so raises the same
        channel.send({"type": "failed", **key, "error": traceback.format_exc()})
        return
    channel.send({"type": "loaded", **key, "sizes": sizes}, [descriptor])
    os.close(descriptor)
