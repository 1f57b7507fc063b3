"""Writes a job's messages to stderr, in a thread of its own, so that a closed or full stderr neither ends nor blocks the job."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from elastic.observe.encodings import encodable

CLEARS_LINE = "\r\x1b[2K"
"""Goes to the beginning of a terminal's line, and empties it."""

_WAITING = 1000
_DRAIN_S = 1.0


class Console:
    """Writes sentences in order to `stream`, by default stderr. Sentences that cannot be written, or exceed the queue, are discarded."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._sentences: queue.Queue[str | threading.Event] = queue.Queue(_WAITING)
        self._thread: threading.Thread | None = None
        self.heard: Callable[[str], None] = lambda _: None
        """Called with each sentence, in the thread that says it."""

        self.lead = ""
        """Written before each sentence: what clears the line of a terminal on which a progress bar stands."""

    def say(self, sentence: str) -> None:
        """Queues a sentence and returns at once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="elastic-console", daemon=True)
            self._thread.start()
        with suppress(queue.Full):
            self._sentences.put_nowait(sentence)
        self.heard(sentence)

    def drain(self, patience_s: float = _DRAIN_S) -> None:
        """Returns when everything is written, or after `patience_s`."""
        written = threading.Event()
        if self._thread is not None:
            with suppress(queue.Full):
                self._sentences.put_nowait(written)
                written.wait(patience_s)

    def _run(self) -> None:
        while True:
            sentence = self._sentences.get()
            if isinstance(sentence, threading.Event):
                sentence.set()
            else:
                self._write(sentence)

    def _write(self, sentence: str) -> None:
        stream = self._stream or sys.stderr
        if stream is not None:  # None: it was closed before this process began
            text = f"{self.lead}elastic: {sentence}"
            with suppress(OSError, ValueError):  # its reader is gone, the disk is full, or it was closed
                try:
                    print(text, file=stream, flush=True)
                except UnicodeEncodeError:
                    print(encodable(text, stream), file=stream, flush=True)


own = Console()
"""This process's console."""

say, drain = own.say, own.drain
