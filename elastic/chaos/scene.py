"""What an injecting function sees of the job, and the record of what it did."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from elastic.chaos.hosts import Host, Target
from elastic.chaos.injection import Injection
from elastic.chaos.running import RunningJob
from elastic.chaos.sampler import Sampler

_NEAR_S, _POLL_S = 0.0005, 0.01
_LATE_STEPS = 3
_SETTLED_S, _SETTLED_STEPS = 120.0, 5


class NoEffect(Exception):
    """The fault could not be injected, or nothing shows that it took effect; the message says why."""


class Vanished(NoEffect):
    """The victim ended by itself, or by another fault, just before: another one can be chosen."""


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

    `others` are the hosts with members that were left when a host was lost. `at` and `until` are times of time.monotonic().
    """

    injection: Injection
    at: float | None = None
    until: float | None = None
    hits: list[Hit] = field(default_factory=list)
    proof: str | None = None
    why: str | None = "it was not its turn before the job ended"
    others: int | None = None

    @property
    def workers(self) -> set[int]:
        """The workers that it hit."""
        return {hit.worker for hit in self.hits if hit.worker is not None}

    def to_json(self, since: float = 0.0) -> dict[str, Any]:
        """JSON types only; times count from `since`."""
        at, until = (None if each is None else round(each - since, 4) for each in (self.at, self.until))
        fault = {"fault": str(self.injection), "kind": self.injection.kind, "planned": self.injection.to_json()}
        return {**fault, "at": at, "until": until, "hits": [asdict(hit) for hit in self.hits], "proof": self.proof, "why": self.why}


@dataclass
class Scene:
    """The running job, for injecting functions, which run in threads of their own."""

    job: RunningJob
    sampler: Sampler
    over: threading.Event = field(default_factory=threading.Event)

    def target(self, place: int) -> Target:
        """Waits for members, and returns the one at `place`, modulo their number. Raises NoEffect."""
        found = self.wait("the job has members that can be hit", self.job.targets, 60.0)
        return found[place % len(found)]

    def host(self, number: int) -> Host:
        """Waits for hosts whose agents are known, and returns one. Raises NoEffect."""
        found = self.wait("a host takes part", lambda: [host for host in self.job.present if host.agent is not None], 60.0)
        return found[number % len(found)]

    def wait(self, what: str, met: Callable[[], Any], seconds: float, poll_s: float = _POLL_S) -> Any:
        """Waits until the condition is met and returns it. Raises NoEffect if the job ends before, or after so many seconds."""
        deadline = time.monotonic() + seconds
        while not (found := met()):
            if self.over.is_set():
                raise NoEffect(f"the job ended before {what}")
            if time.monotonic() > deadline:
                raise NoEffect(f"not within {seconds:g} s: {what}")
            time.sleep(poll_s)
        return found

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

    def at_phase(self, effect: Effect) -> Target:
        """Waits for the moment of an injection that names a phase of a step, and returns its victim; at once without a phase."""
        injection = effect.injection
        target = self.target(injection.place)
        if injection.phase is None or injection.step is None:
            return target
        wanted: int = injection.step

        def there() -> bool:
            doing = target.doing()
            if doing is None or doing.step < wanted:
                return False
            return doing.phase == injection.phase or doing.step > wanted + _LATE_STEPS

        self.wait(f"worker {target.worker} is in {injection.phase} of step {wanted}", there, 60.0, _NEAR_S)
        return target

    def hit(self, effect: Effect, target: Target) -> Hit:
        """Adds a victim to the record, with what it is doing now."""
        doing = target.doing()
        hit = Hit(pid=target.pid, worker=target.worker, host=target.host.number)
        if doing is not None:
            hit.epoch, hit.step, hit.phase = doing.epoch, doing.step, doing.phase
        effect.hits.append(hit)
        return hit
