"""What is known after a run: a value, from which oracles judge. Times are of time.monotonic()."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from elastic.chaos.sampler import Seen
from elastic.chaos.scene import Effect
from elastic.chaos.schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """One step as the loop of one worker was given it."""

    worker: int
    pid: int
    at: float
    step: int
    loss: float
    grad_norm: float
    epoch: int
    workers: int
    layout: str
    leader: bool
    tokens_per_second: float = 0.0
    skipped: str | None = None

    @classmethod
    def of(cls, worker: int, pid: int, line: Mapping[str, Any]) -> Given:
        """From a worker's note."""
        names = ("at", "step", "loss", "grad_norm", "epoch", "workers", "layout", "leader", "tokens_per_second", "skipped")
        return cls(worker=worker, pid=pid, **{name: line[name] for name in names})


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerNotes:
    """The notes of one worker: how its trainer was made (`every`: the steps between its saves), the steps that its loop was given, the
    micro-batches that it loaded as `(step, micro_batch, samples)`, and digests by step."""

    worker: int
    pid: int
    run: str
    began: float
    exact: bool
    batch_size: int
    micro_batch_size: int
    samples: int | None
    given: tuple[Given, ...]
    loads: tuple[tuple[int, int, tuple[int, ...] | None], ...]
    digests: Mapping[int, str]
    returned: bool
    every: int | None = None

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]]) -> WorkerNotes | None:
        """From the lines of its file; None before its trainer was made."""
        by: dict[str, list[Mapping[str, Any]]] = {}
        for line in lines:
            by.setdefault(line["is"], []).append(line)
        if "start" not in by:
            return None
        start = by["start"][0]
        names = ("worker", "pid", "run", "exact", "batch_size", "micro_batch_size", "samples")
        loads = (
            (each["step"], each["micro_batch"], None if each["samples"] is None else tuple(each["samples"])) for each in by.get("load", ())
        )
        return cls(
            **{name: start[name] for name in names},
            began=start["at"],
            given=tuple(Given.of(start["worker"], start["pid"], each) for each in by.get("step", ())),
            loads=tuple(loads),
            digests={each["step"]: each["digest"] for each in by.get("digest", ())},
            returned="returned" in by,
            every=start.get("every"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The undisturbed run: losses and gradient norms from step 0 on, and digests by step. `repeatable` is False if two such runs differ.
    `whole`: the script ended by itself after these steps; else it may have more."""

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    digests: Mapping[int, str]
    repeatable: bool = True
    exact: bool = True
    whole: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HostEnd:
    """How a host's processes ended: exit codes in order, and its log."""

    number: int
    codes: tuple[int, ...]
    log: str
    expected: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What the job left behind. `unread` is why etcd does not say what is left in it, if so."""

    processes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    leases: int = 0
    unread: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that is known of a run.

    `last` is the number of steps after which the job was to end, None if the script ended by itself. `stuck` is the reason if the harness
    had to end the job. `history` has the writes to etcd in order, None without an etcd that could be asked. `reference` is None with a
    reason `no_reference`. `notices` are sentences on how the run was made, such as proxies in place of namespaces.
    """

    schedule: Schedule
    effects: tuple[Effect, ...]
    workers: tuple[WorkerNotes, ...]
    incidents: tuple[dict[str, Any], ...]
    seen: Seen
    hosts: tuple[HostEnd, ...]
    left: Left
    began: float
    ended: float
    processors: int = 1
    last: int | None = None
    stuck: str | None = None
    history: tuple[tuple[str, str | None], ...] | None = None
    reference: Reference | None = None
    no_reference: str = "it was not made"
    notices: tuple[str, ...] = field(default=())

    @property
    def runs(self) -> list[list[WorkerNotes]]:
        """The notes by incarnation of the job, in order of their beginnings."""
        found: dict[str, list[WorkerNotes]] = {}
        for each in sorted(self.workers, key=lambda each: each.began):
            found.setdefault(each.run, []).append(each)
        return list(found.values())

    @property
    def steps(self) -> dict[int, Given]:
        """Every step as it was given last to a worker, the leader's if it has one, in order."""
        found: dict[int, Given] = {}
        for run in self.runs:
            for given in sorted((each for notes in run for each in notes.given), key=lambda each: (each.leader, -each.at)):
                found[given.step] = given
        return dict(sorted(found.items()))

    @property
    def first_fault_at(self) -> float:
        """When the first fault took effect; infinite without one."""
        return min((effect.at for effect in self.effects if effect.at is not None), default=float("inf"))

    @property
    def disclaimed(self) -> set[int]:
        """Steps of which the job says that loops may have been given wrong values: copies of the state differed, and it went back."""
        back = [each for each in self.incidents if each.get("went_back_to") is not None]
        return {step for each in back for step in range(each["went_back_to"] + 1, (each["step"] or 0) + 1)}
