"""A channel of JSON lines over a stream between hosts, which may be encrypted. It carries no descriptors."""

from __future__ import annotations

from elastic.comm.streams import Stream
from elastic.host.channel import Channel
from elastic.memory.raw import room, view

_PART_BYTES = 256 << 10


class StreamChannel(Channel):
    """One end of a connection to another host; it owns the stream's socket."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream.sock)
        self._stream = stream
        self._room = room(_PART_BYTES)

    @property
    def unsent(self) -> bool:
        return super().unsent or self._stream.unsent

    def flush(self) -> None:
        super().flush()
        if self._stream.unsent and not super().unsent:
            try:
                self._stream.flush()
            except OSError:  # `receive` notices
                return

    def _send_some(self) -> int:
        return self._stream.sendmsg([view(bytes(self._outgoing[:_PART_BYTES]))])

    def _read(self) -> bytes:
        """Reads what the kernel has, once, and all that the stream has kept of it, since nothing announces that."""
        parts = [self._part()]
        while self._stream.buffered:
            try:
                parts.append(self._part())
            except OSError:  # the rest of a record is under way; or the next read fails too
                break
        return b"".join(parts)

    def _part(self) -> bytes:
        return bytes(self._room[: self._stream.recv_into(self._room)])
