"""Links between processes: UNIX sockets within a host, TCP between hosts, and one I/O thread for all of them."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from elastic.comm.endpoint import Endpoint, LinkLike, MemberLike, Stats
from elastic.comm.link import Link
from elastic.comm.mailbox import lost
from elastic.comm.message import MessageHeader, Tag, checksum
from elastic.comm.rate_meter import LinkRates
from elastic.comm.reactor import Reactor
from elastic.comm.reception import Reception
from elastic.comm.streams import Stream
from elastic.comm.tls import Tls
from elastic.comm.waiter import Waiter
from elastic.errors import Interrupted, LinkError
from elastic.memory.raw import Memory, as_bytes

_NETWORKS: weakref.WeakSet[Network] = weakref.WeakSet()


class Network(Endpoint):
    """The links of one worker process. `secret` is the job's; `directory` holds its sockets and is created for this user alone.

    Other hosts can reach it at `interface`, an IP address, if one is given; with `tls`, links with them are encrypted.
    """

    def __init__(
        self,
        worker: int,
        *,
        secret: bytes,
        host: str,
        directory: str | os.PathLike[str] | None = None,
        interface: str | None = None,
        tls: Tls | None = None,
    ) -> None:
        super().__init__(worker)
        self._host = host
        self._closed = False
        self._flushing = 0
        self._past = [0] * 5
        self._reactor = Reactor(f"elastic-links-{worker}", crashed=self._crash)
        self._reception = Reception(
            self._reactor,
            worker=worker,
            secret=secret,
            directory=None if directory is None else Path(directory),
            interface=interface,
            tls=tls,
            connected=self._adopt,
            refused=self._refuse,
        )
        _NETWORKS.add(self)

    @property
    def address(self) -> str:
        return self._reception.address

    @property
    def stats(self) -> Stats:
        with self._box.lock:
            links = cast("list[Link]", list(self._links.values()))
            counts = [sum(column) for column in zip(self._past, *(link.counts for link in links), strict=True)]
        return Stats(
            bytes_sent=counts[0],
            bytes_received=counts[1],
            messages=counts[2],
            messages_received=counts[3],
            transferred=counts[4],
            stale_dropped=self._box.stale_dropped,
            links=frozenset(link.peer for link in links),
        )

    def seen(self) -> dict[int, LinkRates]:
        with self._box.lock:
            links = cast("list[Link]", list(self._links.values()))
        return {link.peer: link.seen for link in links}

    @property
    def rejected(self) -> int:
        """The number of connections that failed the handshake."""
        return self._reception.rejected

    def _send(self, link: LinkLike, tag: Tag, buffers: Sequence[Memory]) -> None:
        views = [view.data for view in map(as_bytes, buffers) if view.size]
        proof = 0
        for view in views:
            proof = checksum(view, proof)
        cast(Link, link).sender.send(
            MessageHeader(attempt_id=self._box.attempt_id, tag=tag, bytes=sum(map(len, views)), checksum=proof), views
        )

    def flush(self) -> None:
        attempt_id = self._box.attempt_id
        with self._box.waiter(None) as waiter:
            self._flushing += 1
            try:
                while pending := [link.peer for link in list(self._links.values()) if cast(Link, link).sender.pending]:
                    self._box.check(attempt_id)
                    self.waits(pending[0])
                    waiter.wait()
                    waiter.clear()
            finally:
                self._flushing -= 1
                self.waits(None)

    def _on_emptied(self) -> None:
        # `flush` increments the counter before it checks the queues: it either finds this queue empty or is woken here.
        if self._flushing:
            self._box.wake_all()

    def drop(self, peer: int) -> None:
        with self._box.lock:
            link = self._links.pop(peer, None)
            self._box.failures.pop(peer, None)
        self._box.wake_all()
        if link is not None:
            self._discard(cast(Link, link))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._box.close(Interrupted(f"the links of worker {self.worker} are closed"))
        for peer in list(self._links):
            self.drop(peer)
        self._reactor.stop()
        for peer in list(self._links):
            self.drop(peer)
        self._reception.close()

    def _reach(self, member: MemberLike) -> None:
        peer, local = member.worker, member.host == self._host
        if peer > self.worker:
            self._reception.probe(peer, member.address, local=local)
        elif not self._reception.dialling(peer) and peer not in self._links:
            self._reception.dial(peer, member.address, local=local)

    def _settle(self) -> None:
        self._reception.renew()
        for link in list(self._links.values()):
            cast(Link, link).settle(self._box.attempt_id)

    def _wait(self, waiter: Waiter, peer: int) -> None:
        link = cast("Link | None", self._links.get(peer))
        if link is None:
            return
        link.receive(waiter)
        # Another thread reads this link, or it is broken: the I/O thread wakes the waiter. Returns at once if it was woken already.
        waiter.wait()

    def _discard(self, link: Link) -> None:
        if link.close():
            with self._box.lock:
                self._past = [past + count for past, count in zip(self._past, link.counts, strict=True)]
                self._box.forget(link.peer, link.filling)

    def abandon(self) -> None:
        """Closes a forked child's copies of the sockets, without locks, since the threads that held them do not exist here."""
        for link in self._links.values():
            cast(Link, link).abandon()
        self._reception.close()

    # --- on the I/O thread

    def _adopt(self, stream: Stream, peer: int, latency_s: float | None) -> None:
        link = Link(stream, self.worker, peer, latency_s, box=self._box, reactor=self._reactor, emptied=self._on_emptied, lost=self._lose)
        with self._box.lock:
            old = cast("Link | None", self._links.get(peer))
            self._links[peer] = link
        if old is not None:
            # The peer dials only if it has no link: messages on the old link are lost.
            old.broken = lost(peer, "the other end dropped it")
            self._lose(old)
        self._box.wake_all()

    def _refuse(self, peer: int, error: LinkError) -> None:
        self._refusals[peer] = error
        self._box.wake_all()

    def _lose(self, link: Link) -> None:
        self._discard(link)
        if link.broken is not None:
            self._fail(link, link.broken)

    def _crash(self, error: BaseException) -> None:
        self._box.close(error)
        for peer in list(self._links):
            self.drop(peer)


def _abandon_all() -> None:
    for network in list(_NETWORKS):
        network.abandon()


# A child of a worker (of a DataLoader, say) that kept the sockets open would hide the worker's death from its peers.
os.register_at_fork(after_in_child=_abandon_all)
