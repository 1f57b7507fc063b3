"""What control and the agents tell each other of workers: requests that an agent carries out, and reports that it brings back.

Control names workers by number only. Processes, sockets and shared memory belong to the agent of the worker's host.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from elastic.host.channel import Message
from elastic.observe.activity import Doing
from elastic.observe.silence import SilentWorker
from elastic.view import View


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """The end of a worker's process, as its agent reports it.

    `how` is one line for the user; `own`: the process ended by its own doing; `evicted`: why we ended it, "" if we did not. `step` is the
    last one that the worker told, `doing` what it last entered, None where that is not known.
    """

    worker: int
    how: str
    own: bool = False
    evicted: str = ""
    step: int | None = None
    doing: Doing | None = None


class Carrier(Protocol):
    """Carries requests to workers, on whichever hosts they run. Requests for workers that are gone are dropped."""

    def start(self, workers: Iterable[int]) -> None:
        """Starts new workers with these numbers."""
        ...

    def tell(self, workers: Iterable[int], message: Message) -> None:
        """Sends the message to each of these workers."""
        ...

    def end(self, worker: int, why: str) -> None:
        """Kills the worker. Its death is reported with the first reason that was given."""
        ...

    def look(self, workers: Iterable[int]) -> list[SilentWorker]:
        """Returns what each of these workers does."""
        ...

    def record(self, view: View) -> None:
        """Writes the view's members, with their processes, into the run directory."""
        ...
