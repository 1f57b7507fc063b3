"""Saves that go on while training does: values are copied into one buffer that is kept, and a thread writes them from there."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch

from checkpoint.writer import Run
from elastic.errors import CheckpointError

_log = logging.getLogger(__name__)
_ALIGNMENT = 64

WhenBusy = Literal["wait", "skip"]


class Snapshot:
    """One buffer of host memory, pinned if values come from a GPU. It grows to what is needed and is used again."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        """Of the buffer."""
        return self._buffer.numel()

    def take(self, runs: Iterable[Run]) -> list[Run]:
        """The same runs with values in the buffer. Returns when all are there; the ones taken before are then gone."""
        wanted = list(runs)
        starts = [0]
        for *_, tensor in wanted:
            size = tensor.numel() * tensor.element_size()
            starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
        on_gpu = any(tensor.is_cuda for *_, tensor in wanted)
        if starts[-1] > self.nbytes:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self._buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=on_gpu)
        taken: list[Run] = []
        for (name, state, first, tensor), start in zip(wanted, starts, strict=False):
            size = tensor.numel() * tensor.element_size()
            place = self._buffer[start : start + size].view(tensor.dtype).view(tensor.shape)
            place.copy_(tensor.detach(), non_blocking=on_gpu)
            taken.append((name, state, first, place))
        if on_gpu:
            torch.cuda.synchronize()
        return taken


class AsyncSaver:
    """At most one save is under way, and one buffer exists. `when_busy`: what a save does that is due before the last one has ended."""

    def __init__(self, when_busy: WhenBusy = "wait") -> None:
        self._when_busy = when_busy
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, what: str, runs: Iterable[Run], write: Callable[[Sequence[Run]], object]) -> bool:
        """Copies the values, and lets a thread call `write` with the copies; False if skipped. `what` is for the log.

        Raises CheckpointError of the save before, if it failed; then nothing is begun.
        """
        if self.busy:
            if self._when_busy == "skip":
                _log.warning("%s is skipped: the save before it has not ended", what)
                return False
            _log.warning("%s waits: the save before it has not ended", what)
        self.wait()
        taken = self._snapshot.take(runs)
        self._thread = threading.Thread(target=self._write, args=(write, taken), name=f"checkpoint {what}", daemon=True)
        self._thread.start()
        return True

    def _write(self, write: Callable[[Sequence[Run]], object], taken: Sequence[Run]) -> None:
        try:
            write(taken)
        except BaseException as error:  # a thread's boundary: raised by `wait`
            self._error = error

    def wait(self) -> None:
        """Returns when nothing is under way. Raises what the save raised, once; CheckpointError as it is, the rest inside of one."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if isinstance(error, CheckpointError):
            raise error
        if error is not None:
            raise CheckpointError(f"the save failed: {type(error).__name__}: {error}") from error

    close = wait
