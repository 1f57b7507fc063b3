"""The sending half of a link: a queue of messages; the sending thread hands the kernel as much as it has room for."""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from elastic.comm.message import AttemptId, MessageHeader
from elastic.comm.sockets import SCARCE
from elastic.comm.streams import Stream
from elastic.memory import raw

_MAX_VECTOR = 512


@dataclass(slots=True)
class Outgoing:
    """A queued message: `views` are the bytes that the kernel has not taken yet."""

    attempt_id: AttemptId
    views: list[memoryview]
    started: bool = False


class Sender:
    """The sending half; any thread may send. `arm(True)` requests a call of `push(ready=True)` on the I/O thread when the socket has room
    again, `arm(False)` cancels it; `emptied` is called when the last queued message was handed over. `lock` guards the stream."""

    def __init__(self, stream: Stream, *, arm: Callable[[bool], None], emptied: Callable[[], None]) -> None:
        self.bytes = self.messages = 0
        self.lock = threading.Lock()
        self._stream = stream
        self._arm = arm
        self._emptied = emptied
        self._queue: deque[Outgoing] = deque()
        self._armed = False
        self._closed = False

    @property
    def pending(self) -> bool:
        """Whether a queued message was not handed to the kernel yet."""
        return bool(self._queue) or self._stream.unsent

    def send(self, header: MessageHeader, views: list[memoryview]) -> None:
        """Queues a message and hands the kernel as much as it takes at once."""
        self._queue.append(Outgoing(header.attempt_id, [raw.view(header.pack()), *views]))
        self.push()

    def push(self, *, ready: bool = False) -> None:
        """Hands queued messages to the kernel. While armed, only the I/O thread (`ready`) does so."""
        # The holder of the lock checks the queue again after releasing it, so that no message queued in between is left behind.
        while (ready or (self._queue and not self._armed)) and self.lock.acquire(blocking=False):
            try:
                empty = self._transmit()
                if self._armed == empty:
                    self._armed = not empty
                    self._arm(self._armed)
            finally:
                self.lock.release()
            ready = False
            if empty:
                self._emptied()

    def retire(self, attempt_id: AttemptId) -> None:
        """Discards messages of earlier attempts that were not started. One that was started must be finished: all share one stream."""
        with self.lock:
            for message in list(self._queue):
                if message.attempt_id < attempt_id and not message.started:
                    message.views.clear()

    def close(self) -> None:
        """Stops sending; call it with the lock held."""
        self._closed = True
        self._queue.clear()

    def _transmit(self) -> bool:
        """Hands messages to the kernel. Returns True if the queue is empty, False if the kernel has no room."""
        if self._closed:
            self._queue.clear()
        while self._queue:
            message = self._queue[0]
            if message.views:
                try:
                    count = self._stream.sendmsg(message.views[:_MAX_VECTOR])
                except BlockingIOError:
                    return False
                except OSError as error:
                    if error.errno in SCARCE:  # the kernel has no memory for now
                        return False
                    self._hang_up()
                    return True
                self.bytes += count
                message.started = True
                wanted = sum(map(len, message.views[:_MAX_VECTOR]))
                _consume(message.views, count)
                if count < wanted:
                    return False
                if message.views:
                    continue
                self.messages += 1
            self._queue.popleft()
        return not self._stream.unsent or self._flush()

    def _flush(self) -> bool:
        try:
            return self._closed or self._stream.flush()
        except OSError:
            self._hang_up()
            return True

    def _hang_up(self) -> None:
        # The reader still reads what the peer sent before it left, then finds the end of the stream.
        self._queue.clear()
        try:
            self._stream.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return


def _consume(views: list[memoryview], count: int) -> None:
    """Removes the first `count` bytes."""
    done = 0
    for view in views:
        if count < len(view):
            break
        count -= len(view)
        done += 1
    del views[:done]
    if count:
        views[0] = views[0][count:]
