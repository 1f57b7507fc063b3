"""The sending half of a link: a queue of messages, handed to the kernel by the sending thread as far as there is room."""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from elastic.comm.message import AttemptId, MessageHeader
from elastic.comm.sockets import SCARCE
from elastic.memory import raw

_MAX_VECTOR = 512


@dataclass(slots=True)
class Outgoing:
    """A message on its way out: `views` is what the kernel has not taken yet."""

    attempt_id: AttemptId
    views: list[memoryview]
    begun: bool = False


class Sender:
    """Any thread may send. `arm(True)` asks for a call of `push(ready=True)` on the I/O thread when the socket has room again, `arm(False)`
    calls that off; `emptied` is called when the last queued message was handed over. The socket is used only under `lock`."""

    def __init__(self, sock: socket.socket, *, arm: Callable[[bool], None], emptied: Callable[[], None]) -> None:
        self.bytes = self.messages = 0
        self.lock = threading.Lock()
        self._sock = sock
        self._arm = arm
        self._emptied = emptied
        self._queue: deque[Outgoing] = deque()
        self._armed = False
        self._closed = False

    @property
    def pending(self) -> bool:
        """Whether something queued was not handed to the kernel yet."""
        return bool(self._queue)

    def send(self, header: MessageHeader, views: list[memoryview]) -> None:
        """Queues a message and hands to the kernel what it takes at once."""
        self._queue.append(Outgoing(header.attempt_id, [raw.view(header.pack()), *views]))
        self.push()

    def push(self, *, ready: bool = False) -> None:
        """Hands queued messages to the kernel. While armed that is left to the I/O thread (`ready`)."""
        # Whoever holds the lock looks at the queue again after its release: a message queued meanwhile is never left behind.
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
        """Messages of earlier attempts that were not begun are not sent any more. One that was begun must be finished: it is one stream."""
        with self.lock:
            for message in list(self._queue):
                if message.attempt_id < attempt_id and not message.begun:
                    message.views.clear()

    def close(self) -> None:
        """Nothing more is sent; with the lock held."""
        self._closed = True
        self._queue.clear()

    def _transmit(self) -> bool:
        """True if the queue is empty, False if the kernel is full."""
        if self._closed:
            self._queue.clear()
        while self._queue:
            message = self._queue[0]
            if message.views:
                try:
                    count = self._sock.sendmsg(message.views[:_MAX_VECTOR])
                except BlockingIOError:
                    return False
                except OSError as error:
                    if error.errno in SCARCE:  # the kernel has no memory for now
                        return False
                    self._hang_up()
                    return True
                self.bytes += count
                message.begun = True
                wanted = sum(map(len, message.views[:_MAX_VECTOR]))
                _consume(message.views, count)
                if count < wanted:
                    return False
                if message.views:
                    continue
                self.messages += 1
            self._queue.popleft()
        return True

    def _hang_up(self) -> None:
        # What the peer sent before it went is still to be read; after it the reader finds the end of the stream.
        self._queue.clear()
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
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
