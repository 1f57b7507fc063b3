"""Observations for tests: workers in a given condition, looked at for a while."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from elastic.health.evidence import Observed, Usage
from elastic.health.judge import LOOK_S, Judge
from elastic.health.limits import Limits
from elastic.health.verdict import Verdict
from elastic.observe.activity import NOBODY, Doing, Standing

LIMITS = Limits(stopped_s=1.0, hung_s=3.0)


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What a worker's thread does in one and the same moment; shares are per second. `since`: when the moment began."""

    state: str = "S"
    ran: float = 0.0
    delayed: float = 0.0
    others: float = 0.0
    io: float = 0.0
    wakes: float = 1.0
    phase: str = "forward"
    place: str = "runtime"
    waits_for: int = NOBODY
    longest_s: float = 0.1
    first: bool = False
    step: int = 7
    micro_batch: int = 3
    since: float = 0.0
    recorded: bool = True
    code: str = ""
    mute_s: float = 0.0

    def observed(self, worker: int, now: float) -> Observed:
        age = now - self.since
        usage = Usage(
            ran_s=self.ran * age,
            delayed_s=self.delayed * age,
            cpu_s=(self.ran + self.others) * age,
            io_bytes=int(self.io * age),
            running=self.state == "R",
            wakes=int(self.wakes * age),
            wchan="here",
        )
        doing = Doing(
            worker=worker, pid=70 + worker, phase=self.phase, step=self.step, epoch=1, at=self.since, micro_batch=self.micro_batch
        )
        standing = Standing(place=self.place, waits_for=self.waits_for, longest_s=self.longest_s, first=self.first)
        moment = f"{doing} {standing if self.recorded else None}"
        seen = Observed(
            worker=worker,
            pid=70 + worker,
            seen_at=now,
            moment=moment,
            state=self.state,
            age_s=age,
            usage=usage,
            code=self.code,
            mute_s=self.mute_s,
        )
        return replace(seen, doing=doing, standing=standing) if self.recorded else seen


def waiting(peer: int, **fields: object) -> Condition:
    return Condition(waits_for=peer, phase="ready", micro_batch=-1, **fields)  # pyright: ignore[reportArgumentType]


@dataclass
class Watched:
    """A judge, and the workers that it looks at."""

    workers: dict[int, Condition]
    limits: Limits = LIMITS
    asked: tuple[int, ...] = ()
    starting: tuple[int, ...] = ()
    now: float = 0.0
    found: list[tuple[float, Verdict]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.judge = Judge(self.limits)

    def watch(self, seconds: float, every: float = LOOK_S) -> Watched:
        """Looks for some time."""
        for _ in range(round(seconds / every)):
            self.now += every
            seen = [condition.observed(worker, self.now) for worker, condition in self.workers.items()]
            new = self.judge.look(seen, self.now, asked=self.asked, starting=self.starting)
            self.found += [(self.now, each) for each in new]
        return self

    def become(self, workers: dict[int, Condition]) -> Watched:
        """The workers are in other conditions from now on."""
        self.workers |= {worker: replace(condition, since=self.now) for worker, condition in workers.items()}
        return self

    @property
    def excluded(self) -> list[tuple[int, str]]:
        return [(each.worker, each.kind) for _, each in self.found if each.excludes]

    @property
    def reported(self) -> list[tuple[int, str]]:
        return [(each.worker, each.kind) for _, each in self.found if not each.excludes]

    def when(self) -> float:
        """The time of the first exclusion."""
        return next(at for at, each in self.found if each.excludes)
