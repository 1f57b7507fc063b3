"""What an injecting function sees of the job, and the record of what it did."""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from elastic.chaos.hosts import Host, Target
from elastic.chaos.injection import Injection
from elastic.chaos.running import RunningJob
from elastic.chaos.sampler import Sampler

_POLL_S, _PATIENCE_S = 0.01, 300.0
_SETTLED_S, _SETTLED_STEPS = 120.0, 5


class NoEffect(Exception):
    """The fault could not be injected, or nothing shows that it took effect; the message says why."""


class JobOver(NoEffect):
    """The job ended before the fault could be injected, or before its effect could be seen."""


class Vanished(NoEffect):
    """The victim ended by itself, or by another fault, just before, and nothing was done to it: another one can be chosen."""


class Missed(NoEffect):
    """The fault hit a victim, but not at the moment that it is for: it can be tried again. The message says what it hit instead."""


@dataclass
class Hit:
    """A victim: a worker (None for a host or etcd), its process, and what it was doing."""

    pid: int | None = None
    worker: int | None = None
    host: int | None = None
    epoch: int | None = None
    step: int | None = None
    phase: str | None = None


@dataclass
class Effect:
    """What became of an injection. `proof` is a sentence about the observed effect; None with the reason `why` if there is none.

    `missed` are sentences about earlier tries, each of which missed its moment. `over`: the job ended before there could be a proof.
    `others` are the hosts with members that were left when a host was lost. `at` and `until` are times of time.monotonic().
    """

    injection: Injection
    at: float | None = None
    until: float | None = None
    hits: list[Hit] = field(default_factory=list)
    proof: str | None = None
    why: str | None = "the job ended before it was due"
    missed: list[str] = field(default_factory=list)
    over: bool = True
    others: int | None = None

    @property
    def workers(self) -> set[int]:
        """The workers that it hit."""
        return {hit.worker for hit in self.hits if hit.worker is not None}

    def to_json(self, since: float = 0.0) -> dict[str, Any]:
        """JSON types only; times count from `since`."""
        at, until = (None if each is None else round(each - since, 4) for each in (self.at, self.until))
        fault = {"fault": str(self.injection), "kind": self.injection.kind, "planned": self.injection.to_json()}
        found = {"proof": self.proof, "why": self.why, "missed": self.missed, "over": self.over}
        return {**fault, "at": at, "until": until, "hits": [asdict(hit) for hit in self.hits], **found}


@dataclass
class Scene:
    """The running job, for injecting functions, which run in threads of their own."""

    job: RunningJob
    sampler: Sampler
    over: threading.Event = field(default_factory=threading.Event)
    _turns: dict[str, threading.Lock] = field(default_factory=lambda: defaultdict(threading.Lock))

    def target(self, place: int) -> Target:
        """Waits for members, and returns the one at `place`, modulo their number. Raises JobOver."""
        found = self.wait("it has members that can be hit", self.job.targets)
        return found[place % len(found)]

    def host(self, number: int, least: int = 1) -> Host:
        """Waits until at least so many hosts take part whose agents are known, and returns one of them. Raises JobOver."""
        what = "a host takes part" if least == 1 else f"{least} hosts take part"
        found = self.wait(what, lambda: len(known := [host for host in self.job.present if host.agent is not None]) >= least and known)
        return found[number % len(found)]

    def wait(self, what: str, met: Callable[[], Any], seconds: float = _PATIENCE_S, poll_s: float = _POLL_S) -> Any:
        """Waits until the condition is met and returns it. Raises JobOver if the job ends before, NoEffect after so many seconds."""
        deadline = time.monotonic() + seconds
        while not (found := met()):
            if self.over.is_set():
                raise JobOver(f"the job ended before this was so: {what}")
            if time.monotonic() > deadline:
                raise NoEffect(f"not within {seconds:g} s: {what}")
            time.sleep(poll_s)
        return found

    @contextmanager
    def turn(self, what: str) -> Iterator[None]:
        """Waits until no other fault of this thing lasts: two at once would spoil each other's proofs. Raises JobOver."""
        lock = self._turns[what]
        self.wait(f"the other fault of {what} is over", lambda: lock.acquire(blocking=False), math.inf)
        try:
            yield
        finally:
            lock.release()

    def losing(self, effect: Effect, host: Host) -> None:
        """Notes the hosts with members that are left when this one is lost."""
        epoch = self.job.epoch
        known = [each for each in self.job.present if each is not host and each.members["epoch"] == epoch and each.targets()]
        effect.others = len(known)

    def settle(self) -> None:
        """Waits until the workers of all hosts that take part are members, and have trained for some steps. Raises NoEffect."""
        self.wait("all hosts train together", self._together, _SETTLED_S)
        since = self.sampler.highest
        self.wait("training goes on", lambda: self._together() and self.sampler.highest >= since + _SETTLED_STEPS, _SETTLED_S)

    def _together(self) -> bool:
        present = self.job.present
        epochs = {host.members["epoch"] for host in present}
        return len(present) >= min(2, self.job.schedule.job.hosts) and len(epochs) == 1 and all(host.targets() for host in present)

    def last(self, seconds: float) -> None:
        """Lets a fault last, but not beyond the end of the job."""
        self.over.wait(seconds)

    def last_until(self, met: Callable[[], bool], seconds: float, poll_s: float = _POLL_S) -> None:
        """Waits until the condition is met, so many seconds are over, or the job is."""
        deadline = time.monotonic() + seconds
        while not met() and time.monotonic() < deadline and not self.over.wait(poll_s):
            pass

    def hit(self, effect: Effect, target: Target) -> Hit:
        """Adds a victim to the record, with what it is doing now."""
        doing = target.doing()
        hit = Hit(pid=target.pid, worker=target.worker, host=target.host.number)
        if doing is not None:
            hit.epoch, hit.step, hit.phase = doing.epoch, doing.step, doing.phase
        effect.hits.append(hit)
        return hit
