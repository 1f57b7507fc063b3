"""Turns a division into a plan: which device of a cluster serves which replica of which stage.

A *slot* is one device's place: a stage, a replica, and a tensor-parallel rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from elastic.errors import PlanError
from elastic.plan.cluster import Cluster
from elastic.plan.division.costs import ClusterCosts
from elastic.plan.division.division import Division
from elastic.plan.division.physical import PhysicalRules
from elastic.plan.division.shapes import Pool
from elastic.plan.plan import Plan, Stage
from elastic.plan.prediction import Prediction, predict
from elastic.plan.routing import even_routes
from elastic.plan.saved import SavedPlan
from elastic.plan.workload import MOST_GRAINS


class Device(NamedTuple):
    """One device, printed as `HOST/INDEX`."""

    host: str
    index: int

    def __str__(self) -> str:
        return f"{self.host}/{self.index}"


class DeviceSlot(NamedTuple):
    """The place of one device in a division."""

    stage: int
    replica: int
    rank: int


class Unplaceable(PlanError):
    """There are enough devices, but not enough of them on one host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed:
    """A division with a device in each slot, the resulting plan, and its prediction.

    The plan's members are indices of `members`.
    """

    cluster: Cluster
    rules: PhysicalRules
    division: Division
    devices: Mapping[DeviceSlot, Device]
    plan: Plan
    prediction: Prediction

    @classmethod
    def of(cls, cluster: Cluster, rules: PhysicalRules, division: Division, devices: Mapping[DeviceSlot, Device], why: str) -> Deployed:
        """Makes the plan and its prediction. `why` names the alternatives that the division was chosen from."""
        number = {device: place for place, device in enumerate(_members(cluster, devices))}
        stages: list[Stage] = []
        pools: dict[int, int] = {}
        for depth, section in enumerate(division.stages):
            groups: list[tuple[int, ...]] = []
            for replica, shape in enumerate(section.makeup.each()):
                groups.append(tuple(number[devices[DeviceSlot(depth, replica, rank)]] for rank in range(shape.tp)))
                pools[groups[-1][0]] = shape.pool
            split = any(len(group) > 1 for group in groups)
            stages.append(Stage(layers=section.layers, members=tuple(g[0] for g in groups), groups=tuple(groups) if split else ()))
        grains = _grains(division.micro_batches * division.replicas, division.replicas)
        routes = tuple(even_routes(grains, stage.members) for stage in stages)
        costs = ClusterCosts(rules=rules, micro_batch=division.micro_batch, micro_batches=division.micro_batches, pools=pools)
        predicted = predict(costs, stages, routes)
        slowest = predicted.bottleneck
        layers, took_s = stages[slowest].layers, predicted.stage_s[slowest]
        reason = (
            f"{why}: stage {slowest} (layers {layers.start} to {layers.stop - 1}) is the bottleneck with {took_s:.3g} s per "
            f"micro-batch, of {division.micro_batches}; gradients take {predicted.exchange_s:.3g} s"
        )
        plan = Plan(stages=tuple(stages), routes=routes, step_s=predicted.step_s, why=reason)
        return cls(cluster=cluster, rules=rules, division=division, devices=devices, plan=plan, prediction=predicted)

    @property
    def members(self) -> list[Device]:
        """The devices in use, in the order of the hosts."""
        return _members(self.cluster, self.devices)

    @property
    def idle(self) -> list[Device]:
        """The devices that are not in use."""
        return sorted(set(devices(self.cluster)) - set(self.devices.values()))

    def stage(self, number: int) -> list[Device]:
        """Returns the devices of a stage, by replica and rank."""
        return [device for slot, device in sorted(self.devices.items()) if slot.stage == number]

    def moved_to(self, devices: Mapping[DeviceSlot, Device]) -> Deployed:
        """Returns the same plan with devices exchanged within their pools, which changes no prediction."""
        number = {device: place for place, device in enumerate(self.members)}
        plan = self.plan.renamed({number[device]: number[devices[slot]] for slot, device in self.devices.items()})
        return replace(self, devices=devices, plan=plan)

    def saved(self) -> SavedPlan:
        """Returns the plan for a file; a replica takes consecutive grains."""
        return SavedPlan(
            plan=self.plan,
            hosts=tuple(device.host for device in self.members),
            parameter_bytes=tuple(round(layer.parameters) for layer in self.rules.profiles.bytes[1]),
            micro_batches=self.division.micro_batches * self.division.replicas,
            micro_batch=self.division.micro_batch,
        )


def _members(cluster: Cluster, used: Mapping[DeviceSlot, Device]) -> list[Device]:
    order = {host.name: place for place, host in enumerate(cluster.hosts)}
    return sorted(used.values(), key=lambda device: (order[device.host], device.index))


def _grains(micro_batches: int, replicas: int) -> int:
    """The most grains that all replicas can share equally, up to a trainer's default limit; one per replica if there are more replicas."""
    counts = range(replicas, max(MOST_GRAINS, replicas) + 1, replicas)
    return max(grains for grains in counts if micro_batches % grains == 0)


def devices(cluster: Cluster) -> list[Device]:
    """Returns all devices, in the order of the hosts."""
    return [Device(host.name, index) for host in cluster.hosts for index in range(host.count)]


def lost(cluster: Cluster, what: str) -> set[Device]:
    """Returns the devices that `HOST` or `HOST/INDEX` names. Raises PlanError if there are none."""
    name, _, index = what.partition("/")
    found = {device for device in devices(cluster) if device.host == name and (not index or str(device.index) == index)}
    if not found:
        raise PlanError(f"there is no device {what}: hosts are {', '.join(host.name for host in cluster.hosts)}, devices HOST/0 and so on")
    return found


def without(cluster: Cluster, gone: Collection[Device]) -> Cluster:
    """Returns the cluster of the remaining devices. Raises PlanError if none are left."""
    left = [replace(host, count=count) for host in cluster.hosts if (count := host.count - sum(d.host == host.name for d in gone))]
    used = {host.kind for host in left}
    return replace(cluster, hosts=tuple(left), kinds={name: kind for name, kind in cluster.kinds.items() if name in used})


def deploy(division: Division, cluster: Cluster, pools: Sequence[Pool], available: Collection[Device]) -> dict[DeviceSlot, Device]:
    """Chooses devices for all slots: a replica's ranks share a host, and hosts are filled in turn. Raises Unplaceable if impossible."""
    free: dict[tuple[str, str], list[list[Device]]] = defaultdict(list)
    for host in cluster.hosts:
        free[host.kind, host.zone].append([device for device in sorted(available) if device.host == host.name])
    found: dict[DeviceSlot, Device] = {}
    wanted = [
        (shape.tp, number, replica, pools[shape.pool])
        for number, stage in enumerate(division.stages)
        for replica, shape in enumerate(stage.makeup.each())
    ]
    # The largest replicas first: otherwise they may not fit.
    for tp, number, replica, pool in sorted(wanted, key=lambda want: (-want[0], want[1], want[2])):
        rooms = [room for room in free[pool.kind, pool.zone] if len(room) >= tp]
        if not rooms:
            raise Unplaceable(
                f"no host of {pool.kind} in {pool.zone} has {tp} devices left for replica {replica} of stage {number}: "
                "leave that degree of tensor parallelism out"
            )
        room = min(rooms, key=len)
        for rank in range(tp):
            found[DeviceSlot(number, replica, rank)] = room.pop(0)
    return found
