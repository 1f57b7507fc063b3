"""The messages of a worker that have arrived or are expected, and the threads that wait for them.

A slot holds one message: `post` may make it before the message begins, otherwise the link makes it when a header arrives; `take` removes it
when it is complete. Slots of one key (attempt, peer, tag) are a queue: messages with equal tags are received in the order they were sent.

All wake-ups happen under the mailbox's lock, and a waiter reads the state only after clearing its signal, so that none is missed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from elastic.comm.message import AttemptId, Key
from elastic.comm.waiter import Waiter
from elastic.errors import Interrupted, LinkError, PeerLost
from elastic.memory import raw

_NOTHING = raw.empty(0)


class Slot:
    """One message: the memory in which it arrives (`target`), and the memory that its receiver posted."""

    __slots__ = ("complete", "posted", "started", "target")

    def __init__(self, posted: np.ndarray | None = None) -> None:
        self.posted = posted
        self.target = _NOTHING
        self.started = False
        self.complete = False

    def result(self, key: Key) -> np.ndarray:
        """Returns the received memory: the posted memory if there is some. Raises LinkError if the sizes differ."""
        if self.posted is None or self.posted is self.target:
            return self.target
        if self.posted.nbytes != self.target.nbytes:
            _, peer, tag = key
            raise LinkError(f"worker {peer} sent {self.target.nbytes} bytes for {tag}, {self.posted.nbytes} were posted", peer=peer)
        np.copyto(self.posted, self.target)
        return self.posted


class Mailbox:
    """The messages of one worker, its current attempt, and the errors that stop its waits."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.attempt_id: AttemptId = (0, 0)
        self.failures: dict[int, LinkError] = {}
        self.stale_dropped = 0
        self._slots: dict[Key, deque[Slot]] = {}
        self._interruption: BaseException | None = None
        self._waiters: set[Waiter] = set()
        self._idle: list[Waiter] = []
        self._closed = False

    # --- messages

    def post(self, key: Key, memory: np.ndarray) -> None:
        """Posts `memory` for the next message of this key that has no posted memory yet."""
        with self.lock:
            queue = self._slots.setdefault(key, deque())
            for slot in queue:
                if slot.posted is None:
                    slot.posted = memory
                    return
            queue.append(Slot(memory))

    def begin(self, key: Key, size: int) -> Slot | None:
        """Returns the slot of a message whose header arrived; its target takes `size` bytes. None if the message is stale.

        Raises MemoryError, and changes nothing, if there is no memory for it.
        """
        with self.lock:
            if key[0] < self.attempt_id:
                self.stale_dropped += 1
                return None
            queue = self._slots.setdefault(key, deque())
            slot = next((slot for slot in queue if not slot.started), None)
            posted = None if slot is None else slot.posted
            target = posted if posted is not None and posted.nbytes == size else raw.empty(size)
            if slot is None:
                slot = Slot()
                queue.append(slot)
            slot.started, slot.target = True, target
        return slot

    def finish(self, key: Key, slot: Slot) -> None:
        """Marks a slot complete, since its target is full, and wakes its waiters."""
        with self.lock:
            slot.complete = True
            for waiter in self._waiters:
                if waiter.key is None or waiter.key == key:
                    waiter.wake()

    def has(self, key: Key) -> bool:
        """Whether `take` would return the message."""
        with self.lock:
            queue = self._slots.get(key)
            return bool(queue) and queue[0].complete

    def take(self, key: Key) -> np.ndarray | None:
        """Returns the message if it has arrived whole, else None. Raises the error given to `interrupt`, LinkError on a wrong size."""
        with self.lock:
            self._check_interruption()
            queue = self._slots.get(key)
            if not queue or not queue[0].complete:
                return None
            slot = queue.popleft()
            if not queue:
                del self._slots[key]
        return slot.result(key)

    def owns(self, key: Key, slot: Slot) -> bool:
        """Whether the slot is still needed: false once its attempt is over or its peer is gone."""
        with self.lock:
            return slot in self._slots.get(key, ())

    # --- errors that stop a wait

    def check(self, attempt_id: AttemptId, peer: int | None = None) -> None:
        """Raises what must stop a wait started in `attempt_id`: an interruption, a later attempt, a lost link (any, or that to `peer`)."""
        with self.lock:
            self._check_interruption()
            if attempt_id != self.attempt_id:
                raise Interrupted(
                    f"epoch {attempt_id[0]} attempt {attempt_id[1]} is over: "
                    f"{self.attempt_id[0]} attempt {self.attempt_id[1]} was installed"
                )
            error = next(iter(self.failures.values()), None) if peer is None else self.failures.get(peer)
        if error is not None:
            raise copy_of(error)

    def _check_interruption(self) -> None:
        if self._interruption is not None:
            raise self._interruption

    def interrupt(self, error: BaseException) -> None:
        """Makes every present and later wait raise `error`."""
        with self.lock:
            if not self._closed:
                self._interruption = error
            self._wake_all()

    def resume(self) -> None:
        """Ends an interruption."""
        with self.lock:
            if not self._closed:
                self._interruption = None

    def advance(self, attempt_id: AttemptId) -> None:
        """Begins an attempt: removes messages, posts and failures of earlier ones, and cancels waits started in them."""
        with self.lock:
            self._check_interruption()
            if attempt_id < self.attempt_id:
                raise LinkError(
                    f"epoch {attempt_id[0]} attempt {attempt_id[1]} cannot follow {self.attempt_id[0]} attempt {self.attempt_id[1]}"
                )
            self.attempt_id = attempt_id
            self.failures.clear()
            self._slots = {key: queue for key, queue in self._slots.items() if key[0] >= attempt_id}
            self._wake_all()

    def forget(self, peer: int, partial: Slot | None) -> None:
        """Removes slots of a peer whose link is gone; lock held. Keeps whole messages; removes `partial` and slots only posted."""
        for key, queue in list(self._slots.items()):
            if key[1] == peer:
                kept = deque(slot for slot in queue if slot is not partial and (slot.started or key[0] > self.attempt_id))
                if kept:
                    self._slots[key] = kept
                else:
                    del self._slots[key]

    def close(self, error: BaseException) -> None:
        """Interrupts every present and later wait permanently."""
        with self.lock:
            self._interruption = error
            self._closed = True
            self._wake_all()
            idle, self._idle = self._idle, []
        for waiter in idle:
            waiter.close()

    # --- waiting threads

    def wake_all(self) -> None:
        with self.lock:
            self._wake_all()

    def _wake_all(self) -> None:
        for waiter in self._waiters:
            waiter.wake()

    @contextmanager
    def waiter(self, key: Key | None) -> Iterator[Waiter]:
        """A waiter of the calling thread; it is woken while the context lasts."""
        with self.lock:
            waiter = self._idle.pop() if self._idle else Waiter()
            waiter.assign(key)
            self._waiters.add(waiter)
        try:
            yield waiter
        finally:
            with self.lock:
                self._waiters.discard(waiter)
                closed = self._closed
                if not closed:
                    self._idle.append(waiter)
            if closed:
                waiter.close()


def copy_of(error: LinkError) -> LinkError:
    """Returns a new exception equal to `error`: each waiting thread raises its own."""
    fresh = type(error)(str(error), peer=error.peer)
    fresh.__cause__ = error.__cause__
    return fresh


def lost(peer: int, reason: str, cause: BaseException | None = None) -> PeerLost:
    """Returns the error for a lost link to a worker."""
    error = PeerLost(f"lost the link to worker {peer}: {reason}", peer=peer)
    error.__cause__ = cause
    return error
