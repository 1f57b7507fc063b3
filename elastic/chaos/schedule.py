"""Schedules as values: the job, and the faults that it gets; with a JSON form, and a TOML form for people (`scenario.py`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from elastic.chaos.injection import Injection
from elastic.errors import SettingsError

PRIVATE, OWN = "private", "own"
BUILT_IN = "elastic.chaos.built_in:train"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """The job of a run.

    `script` is the train function, with `args`. There are `hosts` hosts with `workers` workers each. The job ends after `minutes`, or after
    `steps` steps, whichever comes first; 0 means no such limit, and a script that ends by itself ends the job. Without both limits it
    ends soon after its last fault. With `checkpoint_every` steps it saves, also if the script itself does not. `etcd`: the job's private
    one, or one of the harness. Raises SettingsError.
    """

    script: str = BUILT_IN
    args: tuple[Any, ...] = ()
    hosts: int = 1
    workers: int = 3
    stages: int | None = None
    spares: int = 0
    steps: int = 0
    minutes: float = 0.0
    checkpoint_every: int = 0
    etcd: str = PRIVATE
    job_seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("hosts", 1), ("workers", 1), ("spares", 0), ("steps", 0), ("checkpoint_every", 0), ("job_seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise SettingsError(f"{name}={value!r}: use a whole number of at least {least}")
        if not isinstance(self.minutes, int | float) or not 0 <= self.minutes < math.inf:
            raise SettingsError(f"minutes={self.minutes!r}: use a number of at least 0")
        if not isinstance(self.script, str):
            raise SettingsError(f"script={self.script!r}: name a train function, as path.py:function or module:function")
        if self.stages is not None and (not isinstance(self.stages, int) or isinstance(self.stages, bool)):
            raise SettingsError(f"stages={self.stages!r}: use a whole number")
        if self.stages is not None and not 1 <= self.stages <= self.hosts * self.workers:
            raise SettingsError(f"stages={self.stages}: use 1 to {self.hosts * self.workers}, the number of workers on all hosts")
        if self.etcd not in (PRIVATE, OWN):
            raise SettingsError(f"etcd={self.etcd!r}: use {PRIVATE!r} (the job's own) or {OWN!r} (one of the harness)")

    @property
    def shared(self) -> bool:
        """Whether it is run by `elastic agent`, so that other hosts can join."""
        return self.hosts > 1

    def to_json(self) -> dict[str, Any]:
        """JSON types only."""
        return {each.name: getattr(self, each.name) for each in fields(self)} | {"args": list(self.args)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> JobSpec:
        """The inverse of `to_json`. Raises SettingsError for fields that do not exist."""
        known = [each.name for each in fields(cls)]
        if not isinstance(data, Mapping):
            raise SettingsError(f"job={data!r}: a job is a table of {', '.join(known)}")
        if unknown := sorted(set(data).difference(known)):
            raise SettingsError(f"a job has no {', '.join(unknown)}: use {', '.join(known)}")
        args = data.get("args", ())
        if not isinstance(args, list | tuple):
            raise SettingsError(f"args={args!r}: use a list of the arguments that the train function gets")
        return cls(**{**data, "args": tuple(args)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A job and its faults. `seed` is what random victims and the script's random faults were drawn from. `drawn`: the faults are random,
    and those that are due when the script has ended by itself are left out. Raises SettingsError for a fault that the job cannot have."""

    job: JobSpec
    injections: tuple[Injection, ...]
    seed: int = 0
    drawn: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not isinstance(self.drawn, bool):
            raise SettingsError(f"seed={self.seed!r}, drawn={self.drawn!r}: a seed is a whole number, and drawn is true or false")
        self._check_victims()
        for each in self.injections:
            if each.of.hosts > self.job.hosts:
                raise SettingsError(f"{each} needs {each.of.hosts} hosts, and the job has {self.job.hosts}: give --hosts {each.of.hosts}")
            workers = self.job.hosts * self.job.workers
            if each.of.workers > workers:
                raise SettingsError(f"{each} needs {each.of.workers} workers, and the job has {workers}: give --workers {each.of.workers}")
            if each.step is not None and self.job.steps and each.step >= self.job.steps:
                raise SettingsError(f"{each} is due after the last step: the job has {self.job.steps} steps, counted from 0")
            if each.time is not None and self.job.minutes and each.time >= 60 * self.job.minutes:
                raise SettingsError(f"{each} is due after the end: the job runs for {60 * self.job.minutes:g} s")

    def _check_victims(self) -> None:
        """Refuses workers and hosts that the job never has. New hosts may be hit too."""
        hosts = self.job.hosts + sum(each.kind == "join" for each in self.injections)
        for each in self.injections:
            if each.host >= hosts:
                raise SettingsError(f"{each}: there is no host {each.host}: the job has {hosts}, counted from 0")
            if each.place >= hosts * self.job.workers:
                workers = hosts * self.job.workers
                raise SettingsError(f"{each}: there is no worker at place {each.place}: the job has {workers}, counted from 0")

    @property
    def shared(self) -> bool:
        """Whether the job is run by `elastic agent`, so that other hosts can join."""
        return self.job.shared or any(each.of.shared for each in self.injections)

    @property
    def own_etcd(self) -> bool:
        """Whether the job uses an etcd of the harness."""
        return self.job.etcd == OWN or self.shared or any(each.of.own_etcd for each in self.injections)

    def with_faults(self, injections: Sequence[Injection]) -> Schedule:
        """The same job with other faults."""
        return replace(self, injections=tuple(injections))

    def to_json(self) -> dict[str, Any]:
        """JSON types only; `from_json` returns an equal schedule."""
        data = {"job": self.job.to_json(), "faults": [each.to_json() for each in self.injections], "seed": self.seed}
        return {**data, "drawn": True} if self.drawn else data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Schedule:
        """The inverse of `to_json`. Raises SettingsError."""
        if unknown := sorted(set(data).difference(("job", "faults", "seed", "drawn"))):
            raise SettingsError(f"a schedule has no {', '.join(unknown)}: use job, faults, seed and drawn")
        given = data.get("faults", ())
        if not isinstance(given, list | tuple) or not all(isinstance(each, Mapping) for each in given):
            raise SettingsError("each fault is a table: write [[fault]], with a kind and a time or step")
        faults = tuple(map(Injection.from_json, given))
        return cls(job=JobSpec.from_json(data.get("job", {})), injections=faults, seed=data.get("seed", 0), drawn=data.get("drawn", False))
