"""One link: a non-blocking stream socket to one peer, its two halves, and who may touch them.

The receiving half belongs to whoever holds the reader lock, the sending half to whoever holds the sender's; both are usually free. The
I/O thread reads what arrives; a thread that waits for a message of this peer *borrows* the receiving half instead and reads for itself,
which saves a hand-over between threads. A thread that sends writes to the socket at once and leaves only what the kernel has no room for
to the I/O thread. Whoever meets the end of the stream notes it in `broken`; the I/O thread draws the consequence.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from elastic.comm.mailbox import Mailbox, Slot
from elastic.comm.message import AttemptId
from elastic.comm.rate_meter import LinkRates
from elastic.comm.reactor import READABLE, WRITABLE, Reactor
from elastic.comm.receiving import Receiver
from elastic.comm.sending import Sender
from elastic.comm.waiter import Waiter
from elastic.errors import LinkError

_MESSAGES_PER_TURN = 64


class Link:
    """See the top of this file. `emptied` is called when everything queued was handed to the kernel, `lost` on the I/O thread when the link
    broke: it is to close it."""

    def __init__(
        self,
        sock: socket.socket,
        worker: int,
        peer: int,
        latency_s: float | None,
        *,
        box: Mailbox,
        reactor: Reactor,
        emptied: Callable[[], None],
        lost: Callable[[Link], None],
    ) -> None:
        self.peer = peer
        self.latency_s = latency_s
        self.joined: AttemptId | None = None
        self.broken: LinkError | None = None
        self.sender = Sender(sock, arm=self._arm, emptied=emptied)
        self._receiver = Receiver(sock, worker, peer, box)
        self._sock = sock
        self._descriptor = sock.fileno()
        self._box = box
        self._reactor = reactor
        self._lost = lost
        self._closed = False
        self._reader = threading.Lock()
        self._recalls = 0
        self._interest = threading.Lock()
        self._armed = False
        self._lent = False
        reactor.add(self._descriptor, READABLE, self._on_event)

    @property
    def counts(self) -> tuple[int, int, int, int, int]:
        """Bytes sent and received, messages sent and received whole, and the received bytes of state that moved, headers excluded."""
        sender, receiver = self.sender, self._receiver
        return sender.bytes, receiver.bytes, sender.messages, receiver.messages, receiver.transferred

    @property
    def seen(self) -> LinkRates:
        """How fast it is, as far as it was used."""
        return LinkRates(self.latency_s, self._receiver.rate_meter.bytes_per_s)

    def receive(self, waiter: Waiter) -> None:
        """Receives on the calling thread until it is woken or the link breaks; returns at once if the receiving half is not free."""
        if self.broken is not None or self._recalls or not self._reader.acquire(blocking=False):
            return
        try:
            if not self._closed:
                self._receive_borrowed(waiter)
        finally:
            self._reader.release()

    def settle(self, attempt_id: AttemptId) -> None:
        """After the mailbox advanced: nothing of an earlier attempt is written to memory, or begun to be sent, any more."""
        with self._recalled():
            self._receiver.settle()
        self.sender.retire(attempt_id)

    def close(self) -> bool:
        """At once; the peer sees the end of the stream. True for the first call: from then on `filling` is not written to."""
        with self._recalled(), self.sender.lock:
            if self._closed:
                return False
            self._closed = True
            with self._interest:
                self._reactor.remove(self._descriptor)
            self._sock.close()
            self.sender.close()
            return True

    def abandon(self) -> None:
        """In a forked child: closes this process's copy of the socket; the link of the parent goes on."""
        self._closed = True
        self._sock.close()

    @property
    def filling(self) -> Slot | None:
        """The slot of the message that is arriving."""
        return self._receiver.filling

    def _receive_borrowed(self, waiter: Waiter) -> None:
        self._lend(True)
        waiter.watch(self._descriptor)
        try:
            while not self._read(waiter) and self.broken is None:
                waiter.wait()
        finally:
            waiter.unwatch(self._descriptor)
            if self.broken is not None:
                # The I/O thread has to hear of it, also where the stream goes on and nothing more is in it for now.
                with suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)
            self._lend(False)

    def _read(self, waiter: Waiter) -> bool:
        """Reads what is there, at most up to the message that the waiter waits for. True if it was woken."""
        while not waiter.signalled and self._receiver.read():
            continue
        self.broken = self.broken or self._receiver.broken
        return waiter.signalled

    @contextmanager
    def _recalled(self) -> Iterator[None]:
        """The receiving half in the hands of the calling thread, taken back from a borrower."""
        self._recalls += 1
        self._box.wake_all()
        try:
            with self._reader:
                yield
        finally:
            self._recalls -= 1

    def _on_event(self, events: int) -> None:
        if events & WRITABLE:
            self.sender.push(ready=True)
        if events & ~WRITABLE and self._reader.acquire(blocking=False):
            try:
                for _ in range(_MESSAGES_PER_TURN):
                    if self._closed or not self._receiver.read():
                        break
                self.broken = self.broken or self._receiver.broken
            finally:
                self._reader.release()
        if self.broken is not None:
            self._lost(self)

    # --- what the I/O thread looks at

    def _arm(self, armed: bool) -> None:
        with self._interest:
            self._armed = armed
            self._look()

    def _lend(self, lent: bool) -> None:
        with self._interest:
            self._lent = lent
            self._look()

    def _look(self) -> None:
        if not self._closed:
            self._reactor.modify(self._descriptor, (0 if self._lent else READABLE) | (WRITABLE if self._armed else 0))
