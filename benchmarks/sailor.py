"""Reads the data published with Sailor (github.com/eth-easl/sailor): profiles, links, measured runs. Writes plans in Sailor's format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic.errors import PlanError
from elastic.plan.cluster import Cluster, DeviceKind, Host, LinkEnd, LinkMatrix
from elastic.plan.curves import Curve, Polynomial
from elastic.plan.division.division import Division, Section
from elastic.plan.division.shapes import Pool, Shape, together
from elastic.plan.file_fields import numbers
from elastic.plan.profiles import LayerBytes, LayerSeconds, Measured, Profiles

ZONE = "us-central1-a"
"""The zone of Sailor's measured runs."""

GIB = {"V100-16": 16, "A100-40": 40, "A100-80": 80, "GH-96": 96, "Titan-RTX": 24, "RTX-2080": 11, "RTX-3090": 24}
"""Memory of a device in GiB; the data does not include it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sailor:
    """One model's profiles, all links, and the global batch of the model's training configuration, if it has one."""

    profiles: Profiles
    links: LinkMatrix
    batch: int | None

    def cluster(self, devices: Mapping[str, int], zone: str = ZONE) -> Cluster:
        """Returns a cluster with these counts of devices by kind (`V100-16`, or `V100-16@us-west1-b` for another zone than `zone`).

        Hosts have as many devices as the largest measured link end; the last host of a kind may be smaller.
        """
        hosts: list[Host] = []
        for name, count in devices.items():
            kind, _, elsewhere = name.partition("@")
            if kind not in GIB:
                raise PlanError(f"{kind} is not a device kind of this data: {', '.join(GIB)}")
            if count < 1:
                raise PlanError(f"{name}={count}: every kind on the list needs at least one device")
            hosts += _hosts(kind, count, elsewhere or zone, self.per_host(kind, elsewhere or zone))
        kinds = {host.kind: DeviceKind(name=host.kind, memory_bytes=GIB[host.kind] * 2.0**30) for host in hosts}
        return Cluster(kinds=kinds, hosts=tuple(hosts), links=self.links)

    def per_host(self, kind: str, zone: str) -> int:
        """Returns the most devices of a host in any measured link of the kind."""
        return max((a.devices for a, _ in self.links.curves if (a.kind, a.zone) == (kind, zone)), default=1)


def load(folder: Path, model: str) -> Sailor:
    """Reads the data. Raises PlanError naming the file and field that is missing or wrong."""
    return Sailor(profiles=_profiles(folder, model), links=_links(folder), batch=_batch(folder, model))


def _hosts(kind: str, count: int, zone: str, per_host: int) -> Iterator[Host]:
    for number in range(0, count, per_host):
        yield Host(name=f"{kind}-{zone}-{number // per_host}", zone=zone, kind=kind, count=min(per_host, count - number))


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PlanError(f"{path.name} cannot be read: {error}") from None


def _profiles(folder: Path, model: str) -> Profiles:
    times, sizes = _read(folder / "profiles_tmp.json"), _read(folder / "llm_info.json")
    for name, found in (("profiles_tmp.json", times), ("llm_info.json", sizes)):
        if model not in found:
            raise PlanError(f"{name} has no model {model}; it has {', '.join(found)}")
    seconds = {
        Measured(kind, int(size), int(tp)): tuple(LayerSeconds(*row) for row in _in_order(rows, f"{model}.{kind}.{size}.{tp}"))
        for kind, by_size in times[model].items()
        for size, by_tp in by_size.items()
        for tp, rows in by_tp.items()
    }
    by_tp = {
        int(tp): tuple(
            LayerBytes(4 * row["params_floats"], 4 * row["act_mem_floats"], 4 * row["act_output_floats"])
            for row in _in_order(rows, f"{model}.{tp}")
        )
        for tp, rows in sizes[model].items()
    }
    return Profiles(seconds=seconds, bytes=by_tp)


def _in_order(rows: Mapping[str, Any], field: str) -> list[Any]:
    """Returns the rows of layers 0, 1, ..."""
    missing = [layer for layer in range(len(rows)) if str(layer) not in rows]
    if missing:
        raise PlanError(f"{field}.{missing[0]} is missing: layers are numbered from 0 on")
    return [rows[str(layer)] for layer in range(len(rows))]


def _links(folder: Path) -> LinkMatrix:
    curves: dict[tuple[LinkEnd, LinkEnd], Curve] = {}
    for sender, there in _places(_read(folder / "multizone_bandwidths_het.json")):
        for receiver, (coefficients, *_) in _places(there):
            field = f"multizone_bandwidths_het.json: {sender} to {receiver}"
            curves[sender, receiver] = Polynomial(coefficients=numbers(coefficients, field))
    return LinkMatrix(curves=curves)


def _places(table: Mapping[str, Any]) -> Iterator[tuple[LinkEnd, Any]]:
    for zone, kinds in table.items():
        for kind, counts in kinds.items():
            for count, found in counts.items():
                yield LinkEnd(zone, kind, int(count)), found


def _batch(folder: Path, model: str) -> int | None:
    for path in sorted(folder.glob("training_config_*.json")):
        config = _read(path)
        if config.get("model") == model:
            return int(config["global_batch_size"])
    return None


def plan_to_json(plan: Division, pools: Sequence[Pool], per_host: Sequence[int], batch: int) -> dict[str, Any]:
    """Returns the plan in the form of the measured runs: per stage and replica, hosts as `[kind, devices, zone]`, and tp."""
    stages = [[_replica(shape.tp, pools[shape.pool], per_host[shape.pool]) for shape in s.makeup.each()] for s in plan.stages]
    pipeline = {
        "num_stages": len(plan.stages),
        "layers_per_stage": [list(stage.layers) for stage in plan.stages],
        "tmp_per_stage": stages,
        "dp": [plan.replicas] * len(plan.stages),
    }
    return {"pipeline_list": [pipeline], "mbs": plan.micro_batch, "gbs": batch}


def _replica(tp: int, pool: Pool, per_host: int) -> list[Any]:
    sizes = [min(per_host, tp - taken) for taken in range(0, tp, per_host)]
    return [[[pool.kind, size, pool.zone] for size in sizes], tp]


@dataclass(frozen=True, slots=True, kw_only=True)
class SailorRun:
    """A measured run: its plan, the measured seconds of an iteration, and the measured peak bytes."""

    devices: Mapping[str, int]
    zone: str
    stages: tuple[tuple[range, tuple[tuple[str, int], ...]], ...]
    size: int
    micro_batches: int
    step_s: float
    peak_bytes: float

    def sections(self, pools: Sequence[Pool]) -> tuple[Section, ...]:
        """Returns its stages, for a cluster with these pools."""
        numbers = {pool.kind: number for number, pool in enumerate(pools)}
        return tuple(
            Section(layers=layers, makeup=together(Shape(numbers[kind], tp) for kind, tp in replicas)) for layers, replicas in self.stages
        )


def load_run(path: Path) -> SailorRun:
    """Reads a run of a single pipeline. Raises PlanError naming the file and the error in it."""
    data = _read(path)
    try:
        (pipeline,) = data["pipeline_list"]
        stages = tuple(
            (range(layers[0], layers[-1] + 1), tuple((hosts[0][0], tp) for hosts, tp in replicas))
            for layers, replicas in zip(pipeline["layers_per_stage"], pipeline["tmp_per_stage"], strict=True)
        )
        devices: dict[str, int] = {}
        for _, replicas in stages:
            for kind, tp in replicas:
                devices[kind] = devices.get(kind, 0) + tp
        return SailorRun(
            devices=devices,
            zone=data["zone"],
            stages=stages,
            size=data["mbs"],
            micro_batches=-(-data["gbs"] // (data["mbs"] * len(stages[0][1]))),
            step_s=data["real"],
            peak_bytes=data["max_mem"],
        )
    except KeyError as error:
        raise PlanError(f"{path.name}: {error.args[0]} is missing") from None
    except (TypeError, ValueError, IndexError) as error:
        raise PlanError(f"{path.name} is not a measured run of one pipeline: {error}") from None
