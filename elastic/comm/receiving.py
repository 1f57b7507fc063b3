"""The receiving half of a link: reads a header, then memory straight from the socket into the mailbox's target."""

from __future__ import annotations

from elastic.comm.mailbox import Mailbox, Slot, lost
from elastic.comm.message import HEADER_BYTES, Key, MessageHeader, MessageKind, checksum, described
from elastic.comm.rate_meter import RateMeter
from elastic.comm.sockets import SCARCE
from elastic.comm.streams import Stream
from elastic.errors import LinkError
from elastic.memory.raw import room

_BUDGET_BYTES = 4 << 20
_SCRAP = room(256 << 10)
"""The memory for discarded bytes of all links; it is never read."""


class Receiver:
    """The receiving half; the link lets one thread at a time use it. `broken` is the reason, once no more bytes can come."""

    def __init__(self, stream: Stream, worker: int, peer: int, box: Mailbox) -> None:
        self.bytes = self.messages = self.transferred = 0
        self.broken: LinkError | None = None
        self.filling: Slot | None = None
        self.rate_meter = RateMeter()
        self._stream = stream
        self._worker = worker
        self._peer = peer
        self._box = box
        # `_rest` is the unfilled part of the header (no key yet) or of the target of `filling`; `_excess` bytes are to be discarded.
        self._header = room(HEADER_BYTES)
        self._rest = self._header
        # `_sum` is the checksum of the target's bytes so far, `_expected` the sender's checksum of all of them.
        self._excess = 0
        self._sum = self._expected = 0
        self._key: Key | None = None
        self._counts_as_transfer = False

    def read(self) -> bool:
        """Receives until one message is whole (True), or until nothing more is there or the budget for one call is used up (False)."""
        budget = _BUDGET_BYTES
        while budget > 0 and self.broken is None:
            try:
                count = self._stream.recv_into(_SCRAP[: self._excess] if self._excess else self._rest[:budget])
            except BlockingIOError:
                if self._key is not None:
                    self.rate_meter.waits()
                return False
            except OSError as error:
                if error.errno in SCARCE:  # the kernel has no memory for now; the bytes are not lost
                    return False
                self.broken = lost(self._peer, error.strerror or str(error), error)
                return False
            if count == 0:
                self.broken = lost(self._peer, "the other end closed it")
                return False
            self.bytes += count
            self.rate_meter.got(count)
            if self._key is not None and self._counts_as_transfer:
                self.transferred += count
            budget -= count
            if self._advance(count):
                self.messages += 1
                return True
        return False

    def settle(self) -> None:
        """Discards the rest of the arriving message, instead of writing it to its memory, if it is no longer needed."""
        if self._key is not None and self.filling is not None and not self._box.owns(self._key, self.filling):
            self.filling = None
            self._excess = len(self._rest)

    def _advance(self, count: int) -> bool:
        """Accounts for `count` received bytes. Returns True if they complete a message."""
        if self._excess:
            self._excess -= count
            return self._excess == 0 and self._finish()
        if self._key is not None:
            self._sum = checksum(self._rest[:count], self._sum)
        self._rest = self._rest[count:]
        if len(self._rest):
            return False
        return self._begin() if self._key is None else self._finish()

    def _begin(self) -> bool:
        try:
            header = MessageHeader.unpack(self._header)
        except LinkError as error:
            self.broken = LinkError(f"worker {self._peer} broke the protocol with worker {self._worker}: {error}", peer=self._peer)
            return False
        self._key = (header.attempt_id, self._peer, header.tag)
        self._sum, self._expected = 0, header.checksum
        self._counts_as_transfer = header.tag.kind == MessageKind.TRANSFER
        try:
            self.filling = self._box.begin(self._key, header.bytes)
        except MemoryError as error:
            self._key = None
            self.broken = LinkError(f"no memory for {header.bytes} bytes that worker {self._peer} sends", peer=self._peer)
            self.broken.__cause__ = error
            return False
        if self.filling is None:
            self._excess = header.bytes
        else:
            self._rest = self.filling.target.data
        return header.bytes == 0 and self._finish()

    def _finish(self) -> bool:
        if self._key is not None and self.filling is not None:
            if self._sum != self._expected:
                attempt_id, _, tag = self._key
                self.broken = LinkError(
                    f"worker {self._worker} did not get what worker {self._peer} sent, {described(attempt_id, tag)}: checksums differ "
                    f"({self._sum:08x}, sent {self._expected:08x}), so memory or the network changed it; the message was discarded",
                    peer=self._peer,
                )
                return False
            self._box.finish(self._key, self.filling)
        self.rate_meter.ends()
        self._key = self.filling = None
        self._rest = self._header
        return True
