"""Starts the hosts of `control_plane.py`: on each a real agent, and a process that plays its workers. Run by it, as a process of its own.

Python and the modules of the control plane are loaded once; agents are forked from here, before anything runs in a thread. They are
processes with an event loop, etcd sessions and connections of their own.

    benchmark -> here   {folder, hosts, shape, ...} in argv; one launcher's socket per host, inherited
"""

from __future__ import annotations

import cProfile
import gc
import itertools
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from control_model import Shape
from control_workers import HostWorkers

from elastic.agent import forkserver, main
from elastic.host.process import die_with_parent, name_process

COORDINATOR = 0
"""The host that is asked first, so its agent coordinates the job."""


@dataclass(frozen=True, slots=True)
class Adopted:
    """The process that plays a host's workers, as its agent handles a fork server: the parts of `Popen` that a crew uses."""

    pid: int
    pidfd: int

    def send_signal(self, number: int) -> None:
        if number != 18:  # SIGCONT: it is never stopped
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Does nothing: it ends with its connection."""

    def wait(self) -> None:
        """Does not wait: this process is no child of the agent."""


def start(folder: Path, launchers: list[int], options: Mapping[str, object]) -> list[tuple[int, int]]:
    """Forks the processes of all hosts, and returns their pids: of the agent, and of the workers."""
    shape = Shape(**options["shape"])  # pyright: ignore[reportCallIssue]
    assert shape.model.layers
    shape.ready(0, first=False)
    server, pids = os.getpid(), list[tuple[int, int]]()
    for host, launcher in enumerate(launchers):
        agents_end, workers_end = socket.socketpair()
        workers = os.fork()
        if workers == 0:
            die_with_parent(server)
            agents_end.close()
            for each in launchers:
                os.close(each)
            _play(host, folder, workers_end, shape, options)
            os._exit(0)
        workers_end.close()
        agent = os.fork()
        if agent == 0:
            die_with_parent(server)
            for each in launchers:
                if each != launcher:
                    os.close(each)
            if host == COORDINATOR and options["profile"]:
                _profile(str(options["profile"]))
            _supervise(host, launcher, agents_end, workers)
            os._exit(0)
        agents_end.close()
        pids.append((agent, workers))
    return pids


def _play(host: int, folder: Path, agent: socket.socket, shape: Shape, options: Mapping[str, object]) -> None:
    name_process("elastic-played")
    inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    inbox.bind(str(folder / str(host) / "inbox"))
    checks = host % int(options["check_every"]) == 1 if options["check_every"] else False  # pyright: ignore[reportArgumentType]
    step_s = float(options["step_s"])  # pyright: ignore[reportArgumentType]
    HostWorkers(name=str(host), folder=folder, shape=shape, reports=folder / "reports", inbox=inbox, checks=checks, step_s=step_s).run(
        agent
    )


def _supervise(host: int, launcher: int, workers: socket.socket, pid: int) -> None:
    """Becomes an agent, as `elastic.agent.main` does after its exec; its workers are played by the process `pid`."""

    def adopted(environment: Mapping[str, str], socket_fd: int) -> Adopted:
        del environment
        socket.send_fds(workers, [b"f"], [socket_fd])
        return Adopted(pid, os.pidfd_open(pid))

    forkserver.start = adopted  # pyright: ignore[reportAttributeAccessIssue]
    os.dup2(2, 1)
    if host == COORDINATOR:
        with suppress(OSError):  # it would have a machine of its own
            os.nice(-10)
    sys.argv[1:] = [str(launcher)]
    main.main()


def _profile(path: str) -> None:
    """Profiles this process's main thread. Each SIGUSR1 writes what was spent since the last one to `path`, with a number at its end."""
    profiles, count = [cProfile.Profile()], itertools.count()

    def write(*_: object) -> None:
        profiles[-1].disable()
        profiles[-1].dump_stats(f"{path}.{next(count)}")
        profiles.append(cProfile.Profile())
        profiles[-1].enable()

    signal.signal(signal.SIGUSR1, write)
    profiles[-1].enable()


def serve() -> None:
    """Forks the hosts, prints their pids as JSON, and waits until the benchmark ends."""
    die_with_parent(os.getppid())
    request = json.loads(sys.argv[1])
    import elastic.membership.session
    import elastic.recovery.proposal

    assert elastic.membership.session
    assert elastic.recovery.proposal
    assert "torch" not in sys.modules
    assert len(os.listdir("/proc/self/task")) == 1
    gc.freeze()
    pids = start(Path(request["folder"]), request["launchers"], request)
    for each in request["launchers"]:
        os.close(each)
    print(json.dumps(pids), flush=True)
    while sys.stdin.readline():
        time.sleep(0)


if __name__ == "__main__":
    serve()
