"""Links among workers that are threads of one process: the interface and rules of `network`, without sockets."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from elastic.comm.endpoint import Endpoint, LinkLike, MemberLike, Stats
from elastic.comm.mailbox import lost
from elastic.comm.message import HEADER_BYTES, AttemptId, Key, MessageKind, Tag
from elastic.errors import Interrupted, PeerLost
from elastic.memory.raw import Memory, as_bytes


class LoopbackHub:
    """The registry of the workers of one process, one per job."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.networks: dict[int, LoopbackNetwork] = {}


class LoopbackLink:
    """One end of a pair: the network at the other end and, once connected, the other end's own link."""

    def __init__(self, peer: LoopbackNetwork) -> None:
        self.peer = peer.worker
        self.joined: AttemptId | None = None
        self.network = peer
        self.open = True
        self.other: LoopbackLink | None = None


class LoopbackNetwork(Endpoint):
    """One worker's end. The sending thread copies messages straight into posted memory; failures are reported on the thread that causes
    them. Worker ids are unique in a hub."""

    def __init__(self, worker: int, hub: LoopbackHub) -> None:
        super().__init__(worker)
        self._hub = hub
        self._delivery = threading.Lock()
        self._counts = [0] * 5
        with hub.lock:
            hub.networks[worker] = self

    @property
    def address(self) -> str:
        return f"loopback:{self.worker}"

    @property
    def stats(self) -> Stats:
        sent, received, messages, messages_received, transferred = self._counts
        return Stats(
            bytes_sent=sent,
            bytes_received=received,
            messages=messages,
            messages_received=messages_received,
            transferred=transferred,
            stale_dropped=self._box.stale_dropped,
            links=frozenset(self._links),
        )

    def flush(self) -> None:
        """Returns at once, since nothing is ever queued. Raises what `receive` raises."""
        self._box.check(self._box.attempt_id)

    def drop(self, peer: int) -> None:
        with self._hub.lock:
            link = self._links.pop(peer, None)
            self._box.failures.pop(peer, None)
        if isinstance(link, LoopbackLink):
            self._part(link)
        self._box.wake_all()

    def close(self) -> None:
        self._box.close(Interrupted(f"the links of worker {self.worker} are closed"))
        with self._hub.lock:
            if self._hub.networks.get(self.worker) is self:
                del self._hub.networks[self.worker]
        for peer in list(self._links):
            self.drop(peer)

    def _send(self, link: LinkLike, tag: Tag, buffers: Sequence[Memory]) -> None:
        assert isinstance(link, LoopbackLink)
        views = [as_bytes(buffer) for buffer in buffers]
        size = sum(view.size for view in views)
        self._counts[0] += HEADER_BYTES + size
        self._counts[2] += 1
        if link.other is not None:
            link.network.deliver(link.other, (self._box.attempt_id, self.worker, tag), views, size)

    def _reach(self, member: MemberLike) -> None:
        with self._hub.lock:
            peer = self._hub.networks.get(member.worker)
            if peer is None:
                raise PeerLost(f"worker {member.worker} is gone: it is not in the hub", peer=member.worker)
            if peer.worker in self._links:
                return
            mine, theirs = LoopbackLink(peer), LoopbackLink(self)
            mine.other, theirs.other = theirs, mine
            old = peer._links.get(self.worker)
            self._links[peer.worker], peer._links[self.worker] = mine, theirs
        if isinstance(old, LoopbackLink):
            peer._lose(old)
        peer._box.wake_all()
        self._box.wake_all()

    def _settle(self) -> None:
        # A message of an earlier attempt may be in the middle of its copy; once this lock was free, none is.
        with self._delivery:
            return

    def deliver(self, link: LoopbackLink, key: Key, views: list[np.ndarray], size: int) -> None:
        """Delivers a message to this worker, on the sender's thread; `link` is this end of the pair."""
        with self._delivery:
            slot = self._box.begin(key, size) if link.open else None
            if link.open:
                self._counts[1] += HEADER_BYTES + size
                self._counts[3] += 1
                if key[2].kind == MessageKind.TRANSFER:
                    self._counts[4] += size
            if slot is None:
                return
            start = 0
            for view in views:
                slot.target[start : start + view.size] = view
                start += view.size
            self._box.finish(key, slot)

    def _part(self, link: LoopbackLink) -> None:
        """Closes a link that this end dropped; the other end loses it."""
        self._shut(link)
        if link.other is not None:
            link.network._lose(link.other)

    def _lose(self, link: LoopbackLink) -> None:
        if self._shut(link):
            self._fail(link, lost(link.peer, "the other end closed it"))

    def _shut(self, link: LoopbackLink) -> bool:
        """Shuts this end: nothing is delivered over it after this. Returns True for the first call."""
        with self._delivery:
            first, link.open = link.open, False
        if first:
            with self._box.lock:
                self._box.forget(link.peer, None)
        return first
