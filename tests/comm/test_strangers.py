"""Tests that unauthenticated connections cannot end or block a worker, and that other users cannot reach its socket."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import cast

import pytest
from comm_cluster import PATIENCE_S, Cluster, Peer, tag, together, until
from test_network import FullThenFree, connect

from elastic.comm import Network, mailbox, sockets
from elastic.comm.admission import Admission
from elastic.comm.greeting import Greeting
from elastic.comm.handshake import Handshake
from elastic.comm.message import MessageHeader
from elastic.comm.reactor import Reactor
from elastic.comm.sending import Sender
from elastic.errors import LinkError

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(params=["unix", "tcp", "tls"])
def cluster(request: pytest.FixtureRequest):
    made: list[Cluster] = []

    def make(size: int) -> Cluster:
        made.append(Cluster(request.param, range(size)))
        return made[-1].install(range(size))

    yield make
    for each in made:
        each.close()


def talks(c: Cluster) -> None:
    """The first two workers do."""
    c[1].send(0, tag(), b"x")
    assert c[0].receive(1, tag()).tobytes() == b"x"


@contextmanager
def few_descriptors(more: int) -> Iterator[None]:
    """No more than so many besides those that are open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def on_io_thread(network: Network, action) -> None:
    """Runs there, and returns when it is done."""
    over = threading.Event()
    network._reactor.call_after(0, lambda: (action(), over.set()))
    assert over.wait(PATIENCE_S)


def test_running_out_of_descriptors_stops_nobody_and_passes(cluster):
    c = cluster(2)
    strangers: list[socket.socket] = []
    with few_descriptors(30):
        with suppress(OSError):
            while True:
                strangers.append(connect(c[0]))
        assert len(strangers) > 5
        talks(c)
        on_io_thread(c[0], lambda: None)
        for stranger in strangers:
            stranger.close()
        c.start(2)
        c.install([0, 1, 2])
    talks(c)


def test_unauthenticated_connections_are_bounded_in_number_and_the_oldest_give_way(cluster):
    c = cluster(2)
    admission = c[0]._reception.admission
    admission.limit = 4
    with ExitStack() as stack:
        strangers = [stack.enter_context(connect(c[0])) for _ in range(12)]
        for stranger in strangers[:8]:
            while stranger.recv(100):
                pass  # its challenge, then the end
        until(lambda: c[0].rejected == 8)
        assert len(list(admission)) <= 4
        c.start(2)
        c.install([0, 1, 2])
        talks(c)


def test_unauthenticated_connections_are_bounded_in_time(cluster):
    c = cluster(2)
    admission = c[0]._reception.admission
    admission._patience_s = 0.02
    on_io_thread(c[0], admission._sweep)  # those of the install are over; the next one starts a timer
    with connect(c[0]) as stranger:
        while stranger.recv(100):
            pass
    until(lambda: not list(admission))
    talks(c)


def test_a_flood_of_connections_leaves_no_pile_of_deadlines(cluster):
    c = cluster(2)
    pending = c[0]._reactor._calls
    before = len(pending)
    for _ in range(50):
        connect(c[0]).close()
    until(lambda: not list(c[0]._reception.admission))
    assert len(pending) <= before + 1


def test_a_peer_that_gave_way_to_strangers_dials_again(cluster):
    c = cluster(1)
    admission, dropped = c[0]._reception.admission, []
    add = admission.add

    def overrun(greeting: Greeting, *, stranger: bool) -> None:
        add(greeting, stranger=stranger)
        if stranger and len(dropped) < 3:
            dropped.append(greeting)
            c[0]._reactor.call_after(0, admission.relieve)  # before anything of it is read

    admission.add = overrun
    c.start(1)
    c.install([0, 1])
    assert len(dropped) == 3
    talks(c)


def test_a_full_backlog_is_waited_for(monkeypatch):
    monkeypatch.setattr(sockets, "_BACKLOG", 1)
    c, go_on, strangers = Cluster("unix", range(2)), threading.Event(), []
    try:
        c[0]._reactor.call_after(0, lambda: go_on.wait(PATIENCE_S))
        with suppress(BlockingIOError):
            while True:
                strangers.append(sockets.stream(socket.AF_UNIX))
                sockets.connect(strangers[-1], sockets.target_of(0, c[0].address, local=True)[1])
        ahead = c.blocked(1, lambda: c[1].install(1, 0, c.members([0, 1]), [0], timeout_s=PATIENCE_S))
        until(lambda: c[1]._reception.dialling(0))
        go_on.set()
        c[0].install(1, 0, c.members([0, 1]), [1], timeout_s=PATIENCE_S)
        ahead.result(PATIENCE_S)
        talks(c)
    finally:
        go_on.set()
        for stranger in strangers:
            stranger.close()
        c.close()


class Unwilling:
    """A listener whose next `accept` fails."""

    def __init__(self, listener: socket.socket, error: int) -> None:
        self._listener, self._error = listener, error

    def fileno(self) -> int:
        return self._listener.fileno()

    def accept(self) -> tuple[socket.socket, object]:
        raise OSError(self._error, os.strerror(self._error))


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EPROTO, errno.EPERM, errno.ENETDOWN])
def test_no_error_of_accept_ends_the_io_thread(cluster, code):
    c = cluster(2)
    listener = c[0]._reception._listeners[-1]
    on_io_thread(c[0], lambda: c[0]._reception._accept(Unwilling(listener, code)))
    c[0]._reactor.modify(listener.fileno(), 1)  # as after its pause
    c.start(2)
    c.install([0, 1, 2])
    talks(c)


def test_a_connection_that_cannot_be_watched_is_closed_and_made_anew(cluster):
    c = cluster(2)
    add, refused = Reactor.add, []

    def full(self: Reactor, *arguments) -> None:
        if len(refused) < 2:
            refused.append(arguments)
            raise OSError(errno.ENOSPC, "no space for watches")
        add(self, *arguments)

    c.start(2)
    c[0]._reactor.add = full.__get__(c[0]._reactor)
    c.install([0, 1, 2])
    assert len(refused) == 2
    talks(c)


def test_a_message_for_which_there_is_no_memory_breaks_its_link_with_a_reason(cluster, monkeypatch):
    c = cluster(2)
    c[1].post(0, tag(2), bytearray(5))

    def none(size: int) -> None:
        raise MemoryError

    monkeypatch.setattr(mailbox.raw, "empty", none)
    c[0].send(1, tag(2), b"fits.")
    assert c[1].receive(0, tag(2)).tobytes() == b"fits."
    waiting = c.blocked(1, lambda: c[1].receive(0, tag()))
    c[0].send(1, tag(), b"x")
    with pytest.raises(LinkError, match="no memory for 1 bytes that worker 0 sends"):
        waiting.result(PATIENCE_S)
    monkeypatch.undo()
    until(lambda: not c[0].stats.links)
    c.install([0, 1], (2, 0))
    talks(c)


def test_a_kernel_without_memory_is_asked_again():
    class Scarce(FullThenFree):
        def sendmsg(self, views: list[memoryview]) -> int:
            if not self.room:
                raise OSError(errno.ENOBUFS, "no buffers")
            return super().sendmsg(views)

    sock = Scarce()
    sender = Sender(cast(socket.socket, sock), arm=lambda wanted: None, emptied=lambda: None)
    sender.send(MessageHeader(attempt_id=(1, 0), tag=tag(1), bytes=5), [memoryview(b"first")])
    assert sender.pending
    sock.room = True
    sender.push(ready=True)
    assert sock.taken[0].endswith(b"first")


# --- who can reach a worker of the host


def test_within_a_host_workers_listen_where_no_other_user_can_go():
    c = Cluster("unix", range(2)).install(range(2))
    try:
        [directory] = c.directory.iterdir()
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert len(list(directory.iterdir())) == 2
        assert not any("@" in network.address for network in c.networks.values())
    finally:
        c.close()


@pytest.mark.parametrize("name", ["x" * 150, "a,b:c %2C", "ü"])
def test_any_directory_will_do(tmp_path, name):
    peers = [Network(worker, secret=b"s", host="host", directory=tmp_path / name / "links") for worker in (0, 1)]
    try:
        assert "unix:/" in peers[0].address
        members = [Peer(peer.worker, "host", peer.address) for peer in peers]
        together(*(lambda p=p: p.install(1, 0, members, [0, 1], timeout_s=PATIENCE_S) for p in peers))
    finally:
        for peer in peers:
            peer.close()


def test_a_directory_that_others_can_enter_holds_no_socket(tmp_path):
    (tmp_path / "links").mkdir(mode=0o755)
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for place in ("links", "link"):
        network = Network(0, secret=b"s", host="host", directory=tmp_path / place)
        network.close()
        assert network.address.startswith("unix:@")
        assert not list((tmp_path / place).iterdir())


def test_a_removed_directory_is_made_anew_when_members_change():
    c = Cluster("unix", range(2)).install(range(2))
    try:
        shutil.rmtree(c.directory)
        c.start(2)
        c.install([0, 1, 2])
        assert len(list((c.directory / "links").iterdir())) == 3
        talks(c)
    finally:
        c.close()


_KNOCK = """
import os, socket, sys
os.setuid(65534)
sock = socket.socket(socket.AF_UNIX)
sock.connect("\\0" + sys.argv[1])
print(sock.recv(100))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_another_user_gets_not_even_a_challenge():
    network = Network(0, secret=b"s", host="host")  # without a directory: the abstract namespace
    try:
        name = network.address.partition("@")[2]
        heard = subprocess.run([sys.executable, "-S", "-c", _KNOCK, name], capture_output=True, text=True, timeout=PATIENCE_S)
        assert heard.stdout == "b''\n", heard.stderr
        until(lambda: network.rejected == 1)
    finally:
        network.close()


def test_a_connection_of_another_user_is_closed_at_once(monkeypatch):
    c = Cluster("unix", range(2)).install(range(2))
    try:
        with monkeypatch.context() as other:
            other.setattr(sockets, "of_this_user", lambda sock: False)
            with connect(c[0]) as stranger:
                assert stranger.recv(100) == b""
        until(lambda: c[0].rejected == 1)
        talks(c)
    finally:
        c.close()


def test_the_oldest_stranger_gives_way_before_anyone_that_was_dialled():
    reactor = Reactor("elastic-test", crashed=lambda error: None)
    ended: list[str] = []
    try:
        admission = Admission(reactor, limit=1)

        def greeting(name: str) -> Greeting:
            one, _ = pair = socket.socketpair()
            pairs.append(pair)
            return Greeting(one, Handshake(secret=b"s", worker=0, peer=None), done=lambda *_: None, failed=lambda _: ended.append(name))

        pairs: list[tuple[socket.socket, socket.socket]] = []
        admission.add(greeting("dialled"), stranger=False)
        for name in ("first", "second", "third"):
            admission.add(greeting(name), stranger=True)
        assert ended == ["first", "second"]
        for pair in pairs:
            for end in pair:
                end.close()
    finally:
        reactor.stop()
