"""Plans in files: readable TOML, from which a job can start if its members, model and batch are those of the plan.

A file has no worker ids: members are places, 0, 1, ... in the order of a job's workers.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from elastic.errors import PlanError
from elastic.plan.file_fields import item, number, sequence, text, whole
from elastic.plan.plan import Plan, Stage
from elastic.plan.workload import Workload

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

VERSION = 1
"""Version of the file format. A reader refuses all others."""

CLOSE = 0.01
"""Share by which a layer's bytes may differ from the plan's: a job pads parameters, files estimate them."""

_HEAD = """\
# A plan of `elastic plan`: which members hold which layers, and which member computes which grain (a run of micro-batches).
# Start a job with it: `elastic run --plan FILE`. Members are places: 0 is the job's first worker.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedPlan:
    """A plan whose members are places, and the job it is for: the host of each place, bytes of each layer's parameters, and the batch.

    `micro_batch` is the number of samples in a micro-batch, None if unknown. Raises PlanError if a member has no host, or the parts are
    inconsistent.
    """

    plan: Plan
    hosts: tuple[str, ...]
    parameter_bytes: tuple[int, ...]
    micro_batches: int
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        if sorted(self.plan.devices) != list(range(len(self.hosts))):
            raise PlanError(f"the plan's members are {sorted(self.plan.devices)}, and {len(self.hosts)} places have a host")
        if self.plan.stages[-1].layers.stop != len(self.parameter_bytes):
            raise PlanError(f"the stages hold {self.plan.stages[-1].layers.stop} layers, and the model has {len(self.parameter_bytes)}")
        if not self.grains or self.micro_batches < 1 or self.micro_batches % self.grains:
            raise PlanError(f"{self.micro_batches} micro-batches cannot be cut into the {self.grains} grains of the routes")

    @property
    def grains(self) -> int:
        """Grains of a step."""
        return len(self.plan.routes[0])

    @classmethod
    def of(cls, plan: Plan, hosts: Mapping[int, str], workload: Workload) -> SavedPlan:
        """The plan of a job whose workers, in their order, are on `hosts`."""
        places = {worker: place for place, worker in enumerate(hosts)}
        return cls(
            plan=plan.renamed(places),
            hosts=tuple(hosts.values()),
            parameter_bytes=tuple(layer.parameter_bytes for layer in workload.layers),
            micro_batches=workload.micro_batches,
        )

    def differences(self, hosts: Sequence[str], workload: Workload) -> list[str]:
        """Returns how a job differs from the one that the plan is for, as clauses for people; empty if the job can start with this plan."""
        found = self._other_members(hosts)
        count = len(workload.layers)
        if count != len(self.parameter_bytes):
            found.append(f"its model has {_counted(len(self.parameter_bytes), 'layer')}, and this job's {count}")
        else:
            found += self._other_layers([layer.parameter_bytes for layer in workload.layers])
        ours, theirs = (self.micro_batches, self.grains), (workload.micro_batches, workload.grains)
        if ours != theirs:
            found.append("it cuts a step into {} micro-batches in {} grains, and this job into {} in {}".format(*ours, *theirs))
        return found

    def _other_members(self, hosts: Sequence[str]) -> list[str]:
        if len(hosts) != len(self.hosts):
            return [f"it is for {_counted(len(self.hosts), 'worker')}, and this job has {len(hosts)}"]
        ours, theirs = _sizes(self.hosts), _sizes(hosts)
        found = [] if ours == theirs else [f"its workers are {_on(ours)}, and this job's {_on(theirs)}"]
        if any(stage.groups for stage in self.plan.stages):
            found.append("it spreads layers over several devices by tensor parallelism, which jobs do not support yet")
        return found

    def _other_layers(self, sizes: Sequence[int]) -> list[str]:
        for layer, (ours, theirs) in enumerate(zip(self.parameter_bytes, sizes, strict=True)):
            if abs(ours - theirs) > CLOSE * max(ours, theirs):
                return [f"its model's layer {layer} has {ours} bytes of parameters, and this job's {theirs}"]
        return []

    def for_workers(self, workers: Sequence[int]) -> Plan:
        """The plan with these workers in its places."""
        return self.plan.renamed(dict(enumerate(workers)))

    def to_json(self) -> dict[str, Any]:
        """Returns the content of a file as JSON types; `from_json` returns an equal value."""
        step = {"micro_batches": self.micro_batches} | ({} if self.micro_batch is None else {"micro_batch": self.micro_batch})
        return {
            "version": VERSION,
            "step_s": self.plan.step_s,
            "why": self.plan.why,
            "step": step,
            "model": {"parameter_bytes": list(self.parameter_bytes)},
            "members": {"hosts": list(self.hosts)},
            "stages": [_stage_to_json(stage, route) for stage, route in zip(self.plan.stages, self.plan.routes, strict=True)],
        }

    @classmethod
    def from_json(cls, data: Any) -> SavedPlan:
        """The inverse of `to_json`. Raises PlanError naming the version or the wrong field."""
        found = whole(item(data, "version", ""), "version")
        if found != VERSION:
            raise PlanError(f"version is {found}, and this elastic reads version {VERSION}: make the plan again with `elastic plan`")
        rows = sequence(item(data, "stages", ""), "stages", _stage_from_json)
        if not rows:
            raise PlanError("stages is empty: a plan has at least one")
        stages, routes = zip(*rows, strict=True)
        step_s, why = number(item(data, "step_s", ""), "step_s"), text(item(data, "why", ""), "why")
        step, model, members = (item(data, key, "") for key in ("step", "model", "members"))
        return cls(
            plan=Plan(stages=stages, routes=routes, step_s=step_s, why=why),
            hosts=sequence(item(members, "hosts", "members"), "members.hosts", text),
            parameter_bytes=sequence(item(model, "parameter_bytes", "model"), "model.parameter_bytes", whole),
            micro_batches=whole(item(step, "micro_batches", "step"), "step.micro_batches"),
            micro_batch=whole(step["micro_batch"], "step.micro_batch") if "micro_batch" in step else None,
        )

    def to_toml(self) -> str:
        """Returns the text of a file."""
        data = self.to_json()
        tables = {name: value for name, value in data.items() if isinstance(value, Mapping)}
        parts = [_HEAD + _lines({name: data[name] for name in ("version", "step_s", "why")})]
        parts += [f"[{name}]\n{_lines(table)}" for name, table in tables.items()]
        parts += [f"[[stages]]\n{_lines(stage)}" for stage in data["stages"]]
        return "\n".join(parts)


def save(saved: SavedPlan, path: str | os.PathLike[str]) -> None:
    """Writes a file, replacing one of that name. Raises PlanError if it cannot be written."""
    try:
        Path(path).write_text(saved.to_toml(), encoding="utf-8")
    except OSError as error:
        raise PlanError(f"{path} cannot be written: {error.strerror}") from error


def load(path: str | os.PathLike[str]) -> SavedPlan:
    """Reads a file that `save` wrote. Raises PlanError naming the file, and the version or the wrong field."""
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"the plan {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"the plan {path} is not TOML: {error}") from error
    try:
        return SavedPlan.from_json(data)
    except PlanError as error:
        raise PlanError(f"the plan {path} cannot be used: {error}") from None


def _stage_to_json(stage: Stage, route: Sequence[int]) -> dict[str, Any]:
    groups = {"groups": [list(group) for group in stage.groups]} if stage.groups else {}
    return {"layers": [stage.layers.start, stage.layers.stop], "members": list(stage.members), **groups, "member_of_grain": list(route)}


def _stage_from_json(row: Any, field: str) -> tuple[Stage, tuple[int, ...]]:
    layers, members, route = (sequence(item(row, key, field), f"{field}.{key}", whole) for key in ("layers", "members", "member_of_grain"))
    if len(layers) != 2:
        raise PlanError(f"{field}.layers must be the first layer and one past the last, not {list(layers)}")
    groups = sequence(row.get("groups", []), f"{field}.groups", lambda group, name: sequence(group, name, whole))
    return Stage(layers=range(*layers), members=members, groups=groups), route


def _lines(table: Mapping[str, Any]) -> str:
    return "".join(f"{name} = {_toml(value)}\n" for name, value in table.items())


def _toml(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"[{', '.join(map(_toml, value))}]" if isinstance(value, list) else repr(value)


def _sizes(hosts: Sequence[str]) -> list[int]:
    """Returns the numbers of consecutive workers that share a host."""
    return [len(list(same)) for _, same in groupby(hosts)]


def _on(sizes: Sequence[int]) -> str:
    return f"on {_counted(len(sizes), 'host')} ({', '.join(map(str, sizes))})"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
