"""The base class of communicators: the mailbox of a worker, and `install`, which edits the set of links in place.

Both ends of each link agree on an attempt: each sends one HELLO of the new attempt, over the link they kept or over a new one, and the link
counts as *joined* when both have sent it. So neither end relies on a link that the other has dropped. The loss of a link that is not joined
yet is no failure: the link is made again, or its peer proves to be gone.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from elastic.comm.mailbox import Mailbox, copy_of, lost
from elastic.comm.message import AttemptId, Key, MessageKind, Tag
from elastic.comm.rate_meter import LinkRates
from elastic.comm.waiter import Waiter
from elastic.errors import LinkError
from elastic.memory.raw import Memory, as_writable_bytes

_HELLO = Tag(MessageKind.HELLO, 0)


class MemberLike(Protocol):
    """A worker and its address: `elastic.view.Member` is one."""

    @property
    def worker(self) -> int: ...
    @property
    def host(self) -> str: ...
    @property
    def address(self) -> str: ...


class LinkLike(Protocol):
    """A connection to one peer; `joined` is the attempt both ends have agreed on."""

    peer: int
    joined: AttemptId | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Counts at the sockets since the start, headers included; `messages` counts those sent whole. `transferred` counts the received bytes
    of state that moved in a migration, without headers."""

    bytes_sent: int
    bytes_received: int
    messages: int
    messages_received: int
    transferred: int
    stale_dropped: int
    links: frozenset[int]


class Endpoint(ABC):
    """One worker's end of all its links. Threads may send and receive concurrently; one at a time may `install`, `drop`, `close`.

    `on_failure(peer, error)` is called on the I/O thread when a joined link is lost; not for links dropped at this end. `waits(peer)` is
    called by a thread that begins to wait for a peer, and `waits(None)` when it has ended waiting. `before_wait()` is called by a thread
    whose `receive` is about to wait; what it raises, `receive` raises.
    """

    def __init__(self, worker: int) -> None:
        self.worker = worker
        self.on_failure: Callable[[int, Exception], None] | None = None
        self.waits: Callable[[int | None], None] = lambda _: None
        self.before_wait: Callable[[], None] = lambda: None
        self._box = Mailbox()
        self._links: dict[int, LinkLike] = {}
        self._refusals: dict[int, LinkError] = {}

    # --- to implement

    @property
    @abstractmethod
    def address(self) -> str:
        """The address at which other workers reach this one."""

    @property
    @abstractmethod
    def stats(self) -> Stats:
        """The counts so far."""

    @abstractmethod
    def flush(self) -> None:
        """Returns when everything queued was handed to the kernel. Raises what `receive` raises."""

    @abstractmethod
    def drop(self, peer: int) -> None:
        """Closes the link to a peer at once, if there is one; posted memory is not written after this returns."""

    @abstractmethod
    def close(self) -> None:
        """Closes everything at once: peers lose their link, waits here raise Interrupted. Queued messages are lost: see `flush`."""

    @abstractmethod
    def _send(self, link: LinkLike, tag: Tag, buffers: Sequence[Memory]) -> None:
        """Sends on a link; on a lost link the message is discarded."""

    @abstractmethod
    def _reach(self, member: MemberLike) -> None:
        """Begins to make the missing link to a peer, if this side dials. Raises PeerLost if the peer is gone."""

    @abstractmethod
    def _settle(self) -> None:
        """Ends writes to memory by messages of earlier attempts; called after the mailbox advanced."""

    def _wait(self, waiter: Waiter, peer: int) -> None:
        """Waits until the waiter is woken."""
        waiter.wait()

    # --- links

    def install(self, epoch: int, attempt: int, members: Sequence[MemberLike], peers: Iterable[int], timeout_s: float = 30.0) -> None:
        """Moves to an attempt: drops links to workers that are not members, keeps the others, makes the missing links to `peers`.

        Collective: returns when every peer has installed the same attempt with this worker among its peers. The higher worker id dials. May
        be called again with the same attempt to add peers. Ends posts, waits and messages of earlier attempts; keeps those of later ones.
        Raises LinkError naming the peers that did not join in time or were refused, PeerLost if one is gone, the error of `interrupt`.
        """
        by_worker = {member.worker: member for member in members}
        wanted = sorted(set(peers) - {self.worker})
        if strangers := [peer for peer in wanted if peer not in by_worker]:
            raise LinkError(f"workers {strangers} are no members of epoch {epoch} attempt {attempt}", peer=strangers[0])
        self._box.advance((epoch, attempt))
        for peer in list(self._links):
            if peer not in by_worker:
                self.drop(peer)
        self._settle()
        self._refusals.clear()
        self._join([by_worker[peer] for peer in wanted], time.monotonic() + timeout_s, timeout_s)

    def _join(self, members: list[MemberLike], deadline: float, timeout_s: float) -> None:
        attempt_id = self._box.attempt_id
        greeted: dict[int, LinkLike | None] = {}
        pending = members
        with self._box.waiter(None) as waiter:
            try:
                while True:
                    waiter.clear()
                    self._box.check(attempt_id)
                    pending = [member for member in pending if not self._join_one(member, attempt_id, greeted)]
                    if not pending:
                        return
                    if (left := deadline - time.monotonic()) <= 0:
                        names = [member.worker for member in pending]
                        raise LinkError(f"worker {self.worker} has no link to workers {names} after {timeout_s:g} s", peer=names[0])
                    self.waits(pending[0].worker)
                    waiter.wait(left)
            finally:
                self.waits(None)

    def _join_one(self, member: MemberLike, attempt_id: AttemptId, greeted: dict[int, LinkLike | None]) -> bool:
        """Takes one step towards a joined link; `greeted` holds the link over which our HELLO was sent, None while a link is being made."""
        peer = member.worker
        if error := self._refusals.pop(peer, None):
            raise error
        link = self._links.get(peer)
        if link is None:
            if peer not in greeted or greeted[peer] is not None:
                greeted[peer] = None
                self._reach(member)
            return False
        if link.joined == attempt_id:
            return True
        if greeted.get(peer) is not link:
            greeted[peer] = link
            self._send(link, _HELLO, ())
        if self._box.take((attempt_id, peer, _HELLO)) is None:
            return False
        with self._box.lock:
            if self._links.get(peer) is link:
                link.joined = attempt_id
        return link.joined == attempt_id

    # --- messages

    @property
    def attempt_id(self) -> AttemptId:
        """The epoch and attempt that messages are sent and received in."""
        return self._box.attempt_id

    def send(self, peer: int, tag: Tag, *buffers: Memory) -> None:
        """Sends the buffers (C-contiguous), concatenated, as one message. Returns at once and copies nothing: the buffers must not change
        until the message was received or `flush` returned. Raises PeerLost if there is no link to the peer, ValueError on other memory."""
        self._send(self.link(peer), tag, buffers)

    def link(self, peer: int) -> LinkLike:
        """Returns the link to a peer. Raises PeerLost if there is none."""
        link = self._links.get(peer)
        if link is None:
            error = self._box.failures.get(peer)
            raise copy_of(error) if error is not None else lost(peer, "it was dropped or never made")
        return link

    def post(self, peer: int, tag: Tag, buffer: Memory) -> None:
        """Posts `buffer` (writable, C-contiguous) for the message with this tag. It is filled straight from the socket if the message has
        not started to arrive. The memory belongs to the network until the message was received, the peer dropped, or a later attempt
        installed. Raises ValueError if the memory cannot be used; a wrong size makes `receive` raise LinkError."""
        self._box.post((self._box.attempt_id, peer, tag), as_writable_bytes(buffer))

    def receive(self, peer: int, tag: Tag, *, fail_any: bool = True) -> np.ndarray:
        """Returns the message with this tag as flat uint8 memory: the posted buffer, or new 64-byte aligned memory that the caller owns.

        Blocks until it is whole. A message that has arrived is returned even if its link was lost since. Otherwise raises PeerLost as soon
        as the link to the peer (with `fail_any`, any joined link) is lost, Interrupted if a later attempt is installed, and the error that
        was given to `interrupt`.
        """
        attempt_id = self._box.attempt_id
        key = (attempt_id, peer, tag)
        if (found := self._take(key, fail_any)) is not None:
            return found
        self.before_wait()
        with self._box.waiter(key) as waiter:
            self.waits(peer)
            try:
                while True:
                    waiter.clear()
                    if (found := self._take(key, fail_any)) is not None:
                        return found
                    self._wait(waiter, peer)
            finally:
                self.waits(None)

    def check(self) -> None:
        """Raises what a wait would raise now, for code that computes for a long time between its waits."""
        self._box.check(self._box.attempt_id)

    def arrived(self, peer: int, tag: Tag) -> bool:
        """Whether `receive` would return at once."""
        return self._box.has((self._box.attempt_id, peer, tag))

    def _take(self, key: Key, fail_any: bool) -> np.ndarray | None:
        attempt_id, peer, _ = key
        found = self._box.take(key)
        if found is None:
            self._box.check(attempt_id, None if fail_any else peer)
            if peer not in self._links:
                raise lost(peer, "it was dropped or never made")
        return found

    def interrupt(self, error: BaseException) -> None:
        """Makes every present and later wait of this worker raise `error`, until `resume`. Any thread may call it."""
        self._box.interrupt(error)

    def resume(self) -> None:
        """Ends an interruption: waits are possible again."""
        self._box.resume()

    def seen(self) -> dict[int, LinkRates]:
        """Returns the observed rates of the links to peers, by peer."""
        return {}

    # --- for implementations

    def _fail(self, link: LinkLike, error: LinkError) -> None:
        """Removes a link that was lost and is closed. Records and reports a failure only if the link was joined in this attempt."""
        with self._box.lock:
            if self._links.get(link.peer) is link:
                del self._links[link.peer]
            failed = link.joined == self._box.attempt_id
            if failed:
                self._box.failures.setdefault(link.peer, error)
        self._box.wake_all()
        if failed and self.on_failure is not None:
            self.on_failure(link.peer, error)
