"""What every communicator shares: the mailbox of its worker, and `install`, which edits the set of links in place.

Installing an attempt is agreed on link by link: each end sends the other one HELLO of the new attempt, over the link they kept or over a
new one, and the link counts as *joined* when both have. So neither end can believe in a link that the other has dropped, and the loss of a
link that is not joined yet is no failure: it is made anew, or its peer turns out to be gone.
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
    """A worker and where to reach it: `elastic.view.Member` is one."""

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
    """Counted at the sockets since the start, headers included; `messages` were sent whole. `transferred` are the received bytes of state
    that moved in a migration, without headers."""

    bytes_sent: int
    bytes_received: int
    messages: int
    messages_received: int
    transferred: int
    stale_dropped: int
    links: frozenset[int]


class Endpoint(ABC):
    """One worker's end of all its links. Threads may send and receive concurrently; `install`, `drop`, `close` are for one at a time.

    `on_failure(peer, error)` is called on the I/O thread when a joined link is lost; not for links dropped at this end.
    """

    def __init__(self, worker: int) -> None:
        self.worker = worker
        self.on_failure: Callable[[int, Exception], None] | None = None
        self._box = Mailbox()
        self._links: dict[int, LinkLike] = {}
        self._refusals: dict[int, LinkError] = {}

    # --- what an implementation provides

    @property
    @abstractmethod
    def address(self) -> str:
        """Where the others reach this worker."""

    @property
    @abstractmethod
    def stats(self) -> Stats:
        """Figures so far."""

    @abstractmethod
    def flush(self) -> None:
        """Returns when everything queued was handed to the kernel. Raises as `receive` does."""

    @abstractmethod
    def drop(self, peer: int) -> None:
        """Closes the link to a peer at once, if there is one; posted memory is not written to any more when this returns."""

    @abstractmethod
    def close(self) -> None:
        """Closes everything at once: peers see their link lost, waits here raise Interrupted. What is queued is lost: see `flush`."""

    @abstractmethod
    def _send(self, link: LinkLike, tag: Tag, buffers: Sequence[Memory]) -> None:
        """Sends on a link; a link that is lost swallows it."""

    @abstractmethod
    def _reach(self, member: MemberLike) -> None:
        """Begins to make the missing link to a peer, if this side is the one that dials. Raises PeerLost if it is gone."""

    @abstractmethod
    def _settle(self) -> None:
        """After the mailbox advanced: from here on nothing of an earlier attempt is written to memory."""

    def _wait(self, waiter: Waiter, peer: int) -> None:
        """Until the waiter is woken."""
        waiter.wait()

    # --- links

    def install(self, epoch: int, attempt: int, members: Sequence[MemberLike], peers: Iterable[int], timeout_s: float = 30.0) -> None:
        """Moves to an attempt: drops links to workers that are no members, keeps the others, makes those to `peers` that are missing.

        Collective: returns when every peer has installed the same attempt with this worker among its peers. The higher worker id dials. May
        be called again with the same attempt to add peers. Ends posts, waits and messages of earlier attempts; those of a later one
        are kept for it.
        Raises LinkError naming the peers that did not come in time or were refused, PeerLost if one is gone, what `interrupt` was given.
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
            while True:
                waiter.clear()
                self._box.check(attempt_id)
                pending = [member for member in pending if not self._join_one(member, attempt_id, greeted)]
                if not pending:
                    return
                if (left := deadline - time.monotonic()) <= 0:
                    names = [member.worker for member in pending]
                    raise LinkError(f"worker {self.worker} has no link to workers {names} after {timeout_s:g} s", peer=names[0])
                waiter.wait(left)

    def _join_one(self, member: MemberLike, attempt_id: AttemptId, greeted: dict[int, LinkLike | None]) -> bool:
        """One step towards a joined link; `greeted` is the link that our HELLO went over, None while one is being made."""
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

    def send(self, peer: int, tag: Tag, *buffers: Memory) -> None:
        """Sends the buffers (C-contiguous), concatenated, as one message. Returns at once; nothing is copied, so they must not change until
        the message was received or `flush` returned. Raises PeerLost if there is no link to the peer, ValueError on other memory."""
        link = self._links.get(peer)
        if link is None:
            error = self._box.failures.get(peer)
            raise copy_of(error) if error is not None else lost(peer, "there is none")
        self._send(link, tag, buffers)

    def post(self, peer: int, tag: Tag, buffer: Memory) -> None:
        """The message with this tag is to end in `buffer` (writable, C-contiguous), straight from the socket if it has not begun to
        arrive. The memory belongs to the network until the message was received, the peer dropped, or a later attempt installed.
        Raises ValueError if the memory cannot be used; a wrong size makes `receive` raise LinkError."""
        self._box.post((self._box.attempt_id, peer, tag), as_writable_bytes(buffer))

    def receive(self, peer: int, tag: Tag, *, fail_any: bool = True) -> np.ndarray:
        """The message with this tag as flat uint8 memory: the posted one, or fresh 64-byte aligned memory that the caller owns.

        Blocks until it is whole. A message that has arrived is returned whatever happened since; else raises PeerLost as soon as the link
        to the peer (with `fail_any`, any joined link) is lost, Interrupted if a later attempt is installed, what was given to `interrupt`.
        """
        attempt_id = self._box.attempt_id
        key = (attempt_id, peer, tag)
        if (found := self._take(key, fail_any)) is not None:
            return found
        with self._box.waiter(key) as waiter:
            while True:
                waiter.clear()
                if (found := self._take(key, fail_any)) is not None:
                    return found
                self._wait(waiter, peer)

    def check(self) -> None:
        """Raises what a wait would raise now: for code that computes for long between its waits."""
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
                raise lost(peer, "there is none")
        return found

    def interrupt(self, error: BaseException) -> None:
        """Every present and later wait of this worker raises `error`, until `resume`. Any thread."""
        self._box.interrupt(error)

    def resume(self) -> None:
        """Waits are possible again."""
        self._box.resume()

    def seen(self) -> dict[int, LinkRates]:
        """How fast the links to peers are, as far as that was observed."""
        return {}

    # --- for implementations

    def _fail(self, link: LinkLike, error: LinkError) -> None:
        """A link was lost and is closed. Only if it was joined in this attempt this is a failure that others need to hear of."""
        with self._box.lock:
            if self._links.get(link.peer) is link:
                del self._links[link.peer]
            failed = link.joined == self._box.attempt_id
            if failed:
                self._box.failures.setdefault(link.peer, error)
        self._box.wake_all()
        if failed and self.on_failure is not None:
            self.on_failure(link.peer, error)
