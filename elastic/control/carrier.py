"""The interface between control and the agents: requests that an agent carries out for workers, and reports that it returns.

Control names workers by number only. Processes, sockets and shared memory belong to the agent of the worker's host.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from elastic.health.evidence import Observed
from elastic.host.channel import Message
from elastic.observe.activity import Doing
from elastic.observe.incident import Incident
from elastic.recovery.inventory import Inventory
from elastic.view import View


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """The end of a worker's process, as its agent reports it.

    `how` is one line for the user. `own`: the process ended by itself, not from outside; `no_memory`: since it, or its device, had no
    memory left. `evicted` is the reason if the runtime ended it,
    else "". `lost` says which host was lost with it, and how that was noticed, if it was. `step` is the last step that the worker reported,
    `doing` the activity that it entered last; None if unknown.
    """

    worker: int
    how: str
    own: bool = False
    no_memory: bool = False
    evicted: str = ""
    lost: str = ""
    step: int | None = None
    doing: Doing | None = None


class Carrier(Protocol):
    """Carries requests to workers on any host. Requests for workers that have ended are dropped."""

    def host_of(self, worker: int) -> str:
        """Returns the name of a worker's host."""
        ...

    def start(self, workers: Iterable[int]) -> None:
        """Starts new workers with these numbers."""
        ...

    def tell(self, workers: Iterable[int], message: Message, segments: Iterable[int] = ()) -> None:
        """Sends the message to each of these workers, with the segments of the workers `segments` of the same host."""
        ...

    def offers(self, workers: Iterable[int]) -> list[Inventory]:
        """Returns inventories of what the segments of these dead workers hold; those of which nothing is left are missing."""
        ...

    def release(self, workers: Iterable[int]) -> None:
        """Frees the segments of these dead workers."""
        ...

    def may_return(self, workers: Iterable[int]) -> bool:
        """Whether the host of one of these lost workers is only silent: it may come back, with what their segments hold."""
        ...

    def end(self, worker: int, why: str) -> None:
        """Kills the worker. Its death is reported with the first reason given."""
        ...

    def look(self, workers: Iterable[int]) -> list[Observed]:
        """Returns an observation of each of these workers."""
        ...

    def log(self, found: Incident) -> None:
        """Appends an incident to the log in each host's run directory."""
        ...

    def record(self, view: View) -> None:
        """Writes the view's members, with their processes, into the run directory."""
        ...
