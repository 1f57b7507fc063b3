"""The fork server: a process that imports torch once and forks the workers, which therefore start fast.

It stays single threaded, since a fork copies only the thread that calls it and would leave the locks of other threads held for ever. The
numeric environment is set when it is executed, since the libraries read it only when they load.

    agent -> fork server   fork {worker, spec}, with the worker's end of its agent socket, and its segment | freeze {modules}
                           check {threads}, with a socket for the result of `worker.node_check`
    fork server -> agent   ready {} | broken {message} | forked {worker, pid}, with a pidfd | exited {worker, status}
"""

from __future__ import annotations

import atexit
import gc
import importlib
import importlib.util
import os
import selectors
import subprocess
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from elastic.host import signals
from elastic.host.channel import Channel, Message
from elastic.host.process import default_children, die_with_parent, module_command, name_process
from elastic.script import sources

# torch imports _dynamo when the first optimizer is made, which takes a second: done once here instead of in every worker.
_PRELOAD = ("torch", "torch._dynamo", "elastic.worker.trainer", "elastic.worker.main")


def start(environment: Mapping[str, str], socket_fd: int) -> subprocess.Popen[bytes]:
    """Executes a fork server that communicates over `socket_fd` and dies with this process."""
    command = module_command("elastic.agent.forkserver", str(socket_fd), str(os.getpid()))
    with signals.shielded():
        return subprocess.Popen(command, env=dict(environment), pass_fds=[socket_fd], stdin=subprocess.DEVNULL)


@dataclass(slots=True)
class _Child:
    worker: int | None  # None: it checks this host
    pid: int
    pidfd: int


@dataclass(slots=True)
class _Server:
    channel: Channel
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    children: dict[int, _Child] = field(default_factory=dict)

    def serve(self) -> _ForkRequest | None:
        """Forks on request until the agent closes the connection. Like fork, it returns twice: None here, the request in a new worker."""
        self.selector.register(self.channel, selectors.EVENT_READ)
        while not self.channel.closed:
            for key, _ in self.selector.select():
                if isinstance(key.data, _Child):
                    self._reap(key.data)
                    continue
                for request in self.channel.receive():
                    if request["type"] == "freeze":
                        sources.freeze(request["modules"])
                    elif (job := self._fork(request)) is not None:
                        return job
        return None

    def _fork(self, request: Message) -> _ForkRequest | None:
        fds, server, worker = request["fds"], os.getpid(), request.get("worker")
        pid = os.fork()
        if pid == 0:
            return self._become_worker(request, server)
        child = _Child(worker=worker, pid=pid, pidfd=os.pidfd_open(pid))
        for fd in fds:
            os.close(fd)
        self.children[pid] = child
        self.selector.register(child.pidfd, selectors.EVENT_READ, child)
        if worker is None:
            return None
        self.channel.send({"type": "forked", "worker": child.worker, "pid": pid}, [child.pidfd])
        return None

    def _become_worker(self, request: Message, server: int) -> _ForkRequest:
        die_with_parent(server)
        name_process("elastic-check" if request["type"] == "check" else f"elastic-w{request['worker']}")
        self.selector.close()
        self.channel.close()
        for child in self.children.values():
            os.close(child.pidfd)
        socket_fd, *segment = request["fds"]
        if request["type"] == "check":
            return _ForkRequest(spec={}, socket_fd=socket_fd, segment_fd=None, checks=request["threads"])
        return _ForkRequest(spec=request["spec"], socket_fd=socket_fd, segment_fd=segment[0] if segment else None)

    def _reap(self, child: _Child) -> None:
        _, status = os.waitpid(child.pid, 0)
        self.selector.unregister(child.pidfd)
        os.close(child.pidfd)
        del self.children[child.pid]
        if child.worker is not None:
            self.channel.send({"type": "exited", "worker": child.worker, "status": os.waitstatus_to_exitcode(status)})


@dataclass(slots=True)
class _Leave:
    """An exit function that ends a worker at once; it is registered before all others, and so called after them.

    The finalization of torch's modules would cost each worker half a second.
    """

    code: int | None = None

    def __call__(self) -> None:
        if self.code is not None:
            try:
                for stream in (sys.stdout, sys.stderr):
                    if stream is not None:
                        stream.flush()
            finally:
                os._exit(self.code)


@dataclass(slots=True)
class _ForkRequest:
    spec: dict[str, Any]
    socket_fd: int
    segment_fd: int | None
    checks: int | None = None  # the threads with which this host is checked


def _preload() -> None:
    gc.disable()  # saves a fifth of the time of importing torch
    for name in _PRELOAD:
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
    sources.note_imported()  # none is the user's: workers need not check them
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise RuntimeError(f"importing torch started {threads - 1} threads, and only a single-threaded process can be forked safely")
    gc.freeze()  # a later collection in a worker leaves these pages shared
    gc.enable()


def main() -> None:
    """Runs the fork server, or a worker after a fork; argv is the socket's descriptor and the agent's pid."""
    die_with_parent(int(sys.argv[2]))
    name_process("elastic-forks")
    signals.outlive()
    default_children()
    leave = _Leave()
    atexit.register(leave)
    channel = Channel.adopt(int(sys.argv[1]))
    try:
        _preload()
    except Exception:  # the process boundary: the agent ends the job with this message
        channel.send({"type": "broken", "message": traceback.format_exc()})
        return
    channel.send({"type": "ready"})
    job = _Server(channel).serve()
    if job is not None and job.checks is not None:
        from elastic.worker.node_check import measured  # imports torch, as below

        Channel.adopt(job.socket_fd).send(measured(job.checks))
        leave.code = 0
    elif job is not None:
        from elastic.worker.main import main as work  # _preload has imported it; the agent, which imports this module, must not

        leave.code = work(job.spec, job.socket_fd, job.segment_fd)
