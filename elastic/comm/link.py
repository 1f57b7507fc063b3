"""One link: a non-blocking stream to one peer, and the locks of its two halves.

The receiving half belongs to the holder of the reader lock, the sending half to the holder of the sender's lock; both are usually free.
The I/O thread reads what arrives. A thread that waits for a message of this peer *borrows* the receiving half instead and reads the socket
itself, which saves a hand-over between threads. A thread that sends writes to the socket at once and leaves to the I/O thread only the
bytes that the kernel has no room for. The thread that reads the end of the stream sets `broken`; the I/O thread then closes the link.
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
from elastic.comm.streams import Stream
from elastic.comm.waiter import Waiter
from elastic.errors import LinkError

_MESSAGES_PER_TURN = 64


class Link:
    """A link, as described at the top of this file. `emptied` is called when everything queued was handed to the kernel; `lost` is called
    on the I/O thread when the link broke, and must close it."""

    def __init__(
        self,
        stream: Stream,
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
        self.sender = Sender(stream, arm=self._arm, emptied=emptied)
        self._receiver = Receiver(stream, worker, peer, box)
        self._stream = stream
        self._sock = stream.sock
        self._descriptor = self._sock.fileno()
        self._box = box
        self._reactor = reactor
        self._lost = lost
        self._closed = False
        self._reader = threading.Lock()
        self._recalls = 0
        self._interest = threading.Lock()
        self._armed = False
        self._lent = False
        self._resuming = False
        reactor.add(self._descriptor, READABLE, self._on_event)
        self._resume()

    @property
    def counts(self) -> tuple[int, int, int, int, int]:
        """Bytes sent, bytes received, messages sent whole, messages received whole, received bytes of moved state (without headers)."""
        sender, receiver = self.sender, self._receiver
        return sender.bytes, receiver.bytes, sender.messages, receiver.messages, receiver.transferred

    @property
    def seen(self) -> LinkRates:
        """The observed rates of this link."""
        return LinkRates(self.latency_s, self._receiver.rate_meter.bytes_per_s)

    def receive(self, waiter: Waiter) -> None:
        """Receives on the calling thread until it is woken or the link breaks; returns at once if another thread has the receiving half."""
        if self.broken is not None or self._recalls or not self._reader.acquire(blocking=False):
            return
        try:
            if not self._closed:
                self._receive_borrowed(waiter)
        finally:
            self._reader.release()
            self._resume()

    def settle(self, attempt_id: AttemptId) -> None:
        """Ends writes to memory and begins no more sends for earlier attempts; called after the mailbox advanced."""
        with self._recalled():
            self._receiver.settle()
        self.sender.retire(attempt_id)

    def close(self) -> bool:
        """Closes the link at once; the peer reads the end of the stream. `filling` is not written after it. True for the first call."""
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
        """Closes a forked child's copy of the socket; the parent's link stays open."""
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
                if not self._stream.buffered:
                    waiter.wait()
        finally:
            waiter.unwatch(self._descriptor)
            if self.broken is not None:
                # Wakes the I/O thread, also if the stream is still open and has no more data for now.
                with suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)
            self._lend(False)

    def _read(self, waiter: Waiter) -> bool:
        """Reads what has arrived, at most up to the message that the waiter waits for. Returns True if it was woken."""
        while not waiter.signalled and self._receiver.read():
            continue
        self.broken = self.broken or self._receiver.broken
        return waiter.signalled

    @contextmanager
    def _recalled(self) -> Iterator[None]:
        """Holds the receiving half for the calling thread; a borrower gives it back first."""
        self._recalls += 1
        self._box.wake_all()
        try:
            with self._reader:
                yield
        finally:
            self._recalls -= 1
            self._resume()

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
                self._resume()
        if self.broken is not None:
            self._lost(self)

    def _resume(self) -> None:
        """Makes the I/O thread read what the stream has and the kernel no longer announces. Call it without the receiving half: a call
        that then finds the half taken is made again by its holder."""
        if self._stream.buffered and not self._resuming and not self._closed and self.broken is None:
            self._resuming = True
            self._reactor.call_after(0.0, self._read_on)

    def _read_on(self) -> None:
        self._resuming = False
        if not self._closed:
            self._on_event(READABLE)

    # --- events that the I/O thread polls

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
