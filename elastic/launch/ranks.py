"""A launcher that starts one process a rank, such as torchrun: how `elastic.run` does its part in such processes.

torchrun restarts all processes of a host when one of them dies. So the processes that it starts do not train. On each host, local rank 0
runs the job's agent, which starts a worker for each rank and replaces those that die; the other ranks wait for the result. torchrun sees no
death of a worker. They meet at a socket in Linux's abstract namespace: it has no file, and vanishes with rank 0.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from elastic import errors
from elastic.errors import ElasticError, HostLost, SettingsError
from elastic.host.channel import Channel, Message
from elastic.host.process import signal_with_parent
from elastic.settings import LaunchedRank, launched_rank

_MEET_S = 120.0  # ranks may import for different times before they call run
_POLL_S = 0.05

T = TypeVar("T")


def check(*, shared: bool) -> LaunchedRank | None:
    """Returns this process's rank, None if it has none. `shared`: hosts run this job together. Raises SettingsError if they do not."""
    found = launched_rank()
    if found is not None and found.world > found.on_host and not shared:
        raise SettingsError(
            f"this program is rank {found.rank} of {found.world}, {found.on_host} of them on this host, and each host would train by "
            "itself: give elastic.run etcd=, name= and secret=, so that they train together, or start `elastic agent` on each host"
        )
    return found


def workers_of(found: LaunchedRank | None, given: int | None) -> int:
    """Returns the number of workers on this host: one for each rank, if there are several. Raises SettingsError if another was `given`."""
    if found is None or found.on_host == 1:
        if given is None:
            raise SettingsError("workers= is missing: give the number of training processes on this host")
        return given
    if given not in (None, found.on_host):
        raise SettingsError(
            f"elastic.run has workers={given}, but {found.on_host} processes of this program were started on this host, and each stands "
            f"for a worker: leave workers= out, or start as many (torchrun --nproc-per-node={given}); or start one, which starts them all "
            "(--nproc-per-node=1)"
        )
    return found.on_host


def hosted(found: LaunchedRank | None, launch: Callable[[], T], to_json: Callable[[T], Message], of_json: Callable[[Message], T]) -> T:
    """Returns the job's result on every rank of this host, and raises its error: local rank 0 launches the job.

    Raises:
        HostLost: on other ranks, if the process of local rank 0 has died or never came.
    """
    if found is None or found.on_host == 1:
        return launch()
    signal_with_parent(signal.SIGTERM)  # torchrun leaves its processes behind when it is killed
    if found.local:
        return of_json(_followed(found))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(_address(found))
        server.listen(found.on_host)
        try:
            result = launch()
        except ElasticError as error:
            _tell(server, found, {"type": "failed", "kind": type(error).__name__, "message": str(error)})
            raise
        except SystemExit as error:
            _tell(server, found, {"type": "exit", "code": error.code})
            raise
        _tell(server, found, {"type": "result", "result": to_json(result)})
        return result


def _address(found: LaunchedRank) -> str:
    return "\0elastic-ranks-" + hashlib.sha256(f"{os.getuid()} {found.meeting}".encode()).hexdigest()[:32]


def _tell(server: socket.socket, found: LaunchedRank, message: Message) -> None:
    """Sends the outcome to the other ranks, which wait in the socket's queue, or come soon."""
    until = time.monotonic() + _MEET_S
    for _ in range(1, found.on_host):
        server.settimeout(max(_POLL_S, until - time.monotonic()))
        with suppress(OSError):  # it has died, or nobody waits any more: torchrun notices
            accepted, _ = server.accept()
            accepted.settimeout(_MEET_S)
            Channel(accepted).send(message)
            accepted.close()


def _followed(found: LaunchedRank) -> Any:
    channel, messages = Channel(_connected(found)), list[Message]()
    while not messages and not channel.closed:
        messages = channel.receive()
    channel.close()
    if not messages:
        raise HostLost("the process of local rank 0, which supervises this host's workers, died: torchrun may start all ranks of it again")
    word = messages[0]
    if word["type"] == "failed":
        raise getattr(errors, word["kind"])(word["message"])
    if word["type"] == "exit":
        raise SystemExit(word["code"])
    return word["result"]


def _connected(found: LaunchedRank) -> socket.socket:
    """Returns a connection to local rank 0, when that listens. Raises HostLost if it does not come, or is another user's."""
    until = time.monotonic() + _MEET_S
    while time.monotonic() < until:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(_address(found))
        except OSError:
            sock.close()
            time.sleep(_POLL_S)  # nothing tells of a socket that will be made
            continue
        _, owner, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if owner != os.getuid():
            sock.close()
            break
        return sock
    raise HostLost(
        f"local rank 0 of this host did not call elastic.run within {_MEET_S:g} s, as this process (local rank {found.local}) did: every "
        "rank must call it, at the same place"
    )
