"""From a partition to devices: which device serves which replica of which stage, what it holds, and what moves when devices are lost.

A *slot* is one device's place: a stage, a replica, and a tensor-parallel rank. It holds its part of the stage's parameters; what the
optimizer keeps is spread over the replicas of the stage (ZeRO-1), and a copy of what nobody else has is with another slot. Losing a device
loses its slot; the others keep what they hold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from elastic.errors import PlanError
from elastic.plan.cluster import Cluster
from elastic.plan.hetero.plan import HeteroPlan
from elastic.plan.hetero.shapes import Pool
from elastic.plan.profiles import Profiles
from elastic.plan.relabel import Balance, Piece, balance, missing, relabel

OPTIMIZER_BYTES = 2.0
"""Of optimizer state for each byte of parameters: two moments, as Adam has."""


class Device(NamedTuple):
    """One device, as `HOST/INDEX`."""

    host: str
    index: int

    def __str__(self) -> str:
        return f"{self.host}/{self.index}"


class Slot(NamedTuple):
    """A place in a plan."""

    stage: int
    replica: int
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A plan, and the device in each of its slots."""

    plan: HeteroPlan
    devices: Mapping[Slot, Device]

    def stage(self, number: int) -> list[Device]:
        """The devices of a stage, by replica and rank."""
        return [device for slot, device in sorted(self.devices.items()) if slot.stage == number]


class Unplaceable(PlanError):
    """There are enough devices, but not in the same hosts."""


def devices(cluster: Cluster) -> list[Device]:
    """All of them, in the order of the hosts."""
    return [Device(host.name, index) for host in cluster.hosts for index in range(host.count)]


def lost(cluster: Cluster, what: str) -> set[Device]:
    """The devices that `HOST` or `HOST/INDEX` names. Raises PlanError if there are none."""
    name, _, index = what.partition("/")
    found = {device for device in devices(cluster) if device.host == name and (not index or str(device.index) == index)}
    if not found:
        raise PlanError(f"there is no device {what}: hosts are {', '.join(host.name for host in cluster.hosts)}, devices HOST/0 and so on")
    return found


def without(cluster: Cluster, gone: Collection[Device]) -> Cluster:
    """The cluster of the devices that are left. Raises PlanError if none are."""
    left = [replace(host, count=count) for host in cluster.hosts if (count := host.count - sum(d.host == host.name for d in gone))]
    used = {host.kind for host in left}
    return replace(cluster, hosts=tuple(left), kinds={name: kind for name, kind in cluster.kinds.items() if name in used})


def deploy(plan: HeteroPlan, cluster: Cluster, pools: Sequence[Pool], available: Collection[Device]) -> Deployment:
    """Devices for all slots: a replica's ranks share a host, and hosts are filled one after the other. Raises Unplaceable if not."""
    free: dict[tuple[str, str], list[list[Device]]] = defaultdict(list)
    for host in cluster.hosts:
        free[host.kind, host.zone].append([device for device in sorted(available) if device.host == host.name])
    found: dict[Slot, Device] = {}
    wanted = [
        (shape.tp, number, replica, pools[shape.pool])
        for number, stage in enumerate(plan.stages)
        for replica, shape in enumerate(stage.makeup.each())
    ]
    for tp, number, replica, pool in sorted(
        wanted, key=lambda want: (-want[0], want[1], want[2])
    ):  # the largest first, or they may not fit
        rooms = [room for room in free[pool.kind, pool.zone] if len(room) >= tp]
        if not rooms:
            raise Unplaceable(
                f"no host of {pool.kind} in {pool.zone} has {tp} devices left for replica {replica} of stage {number}: "
                "leave that degree of tensor parallelism out"
            )
        room = min(rooms, key=len)
        for rank in range(tp):
            found[Slot(number, replica, rank)] = room.pop(0)
    return Deployment(plan=plan, devices=found)


def holdings(deployment: Deployment, profiles: Profiles) -> dict[Slot, list[Piece]]:
    """What each slot needs, in bytes of each layer: parameters as layer 2i, optimizer state as layer 2i + 1.

    What only one host has is kept a second time by a slot in another one, where there is one.
    """
    plan = deployment.plan
    found: dict[Slot, list[Piece]] = {}
    single: dict[Slot, list[Piece]] = {}
    for number, stage in enumerate(plan.stages):
        shapes = stage.makeup.each()
        alone = len({device.host for device in deployment.stage(number)}) == 1
        for replica, shape in enumerate(shapes):
            for rank in range(shape.tp):
                slot = Slot(number, replica, rank)
                parameters, shares = found.setdefault(slot, []), single.setdefault(slot, [])
                for layer in stage.layers:
                    size = int(profiles.bytes[1][layer].parameters)
                    (shares if alone and not replica else parameters).extend(_part(2 * layer, size, rank, shape.tp))
                    shares += _part(2 * layer + 1, int(OPTIMIZER_BYTES * size), replica * shape.tp + rank, len(shapes) * shape.tp)
    slots = sorted(found)
    for place, slot in enumerate(slots):
        for keeper in {slot, _keeper(slot, [*slots[place + 1 :], *slots[:place]], deployment)}:
            found[keeper] = [*found[keeper], *single[slot]]
    return found


def _keeper(slot: Slot, others: Sequence[Slot], deployment: Deployment) -> Slot:
    """The first of the others, from half-way round on, that is in another host; if there is none, any; if it is alone, itself."""
    half = len(others) // 2
    turned = [*others[half:], *others[:half]]
    host = deployment.devices[slot].host
    return next((other for other in turned if deployment.devices[other].host != host), turned[0] if turned else slot)


def _part(layer: int, size: int, place: int, parts: int) -> list[Piece]:
    start, stop = size * place // parts, size * (place + 1) // parts
    return [Piece(layer, start, stop)] if stop > start else []


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """From one deployment to the next: what each device still has, what is sent, and how long the busiest link takes."""

    deployment: Deployment
    kept_bytes: int
    moved_bytes: int
    transfers: Balance
    senders: Mapping[int, Device]


def change(before: Deployment, after: HeteroPlan, candidates: Deployment, profiles: Profiles, rates: Mapping[Device, float]) -> Move:
    """`after` on the surviving devices of `before` so that least moves within each kind and degree, and who sends what.

    `candidates` is any deployment of `after`: slots are exchanged between devices of the same pool and degree only, whole hosts apart.
    Raises PlanError if a part of the state is on no device any more.
    """
    gone = set(before.devices.values()) - set(rates)
    had: dict[Device, list[Piece]] = {device: [] for device in rates}
    for slot, pieces in holdings(before, profiles).items():
        if (device := before.devices[slot]) not in gone:
            had[device] = _joined([*had[device], *pieces])
    needs = {slot: _joined(pieces) for slot, pieces in holdings(candidates, profiles).items()}
    numbers = {device: number for number, device in enumerate(sorted(rates))}
    chosen = dict(candidates.devices)
    for slots in _exchangeable(after, candidates).values():
        ours = [chosen[slot] for slot in slots]
        labels = relabel({numbers[device]: had[device] for device in ours}, [needs[slot] for slot in slots])
        by_number = {numbers[device]: device for device in ours}
        chosen |= {slot: by_number[number] for slot, number in zip(slots, labels.workers, strict=True)}
    held = {numbers[device]: pieces for device, pieces in had.items()}
    lacking = missing(held, {numbers[device]: needs[slot] for slot, device in chosen.items()})
    transfers = balance(lacking, {numbers[device]: rate for device, rate in rates.items()})
    moved = sum(each.piece.stop - each.piece.start for each in lacking)
    total = sum(piece.stop - piece.start for pieces in needs.values() for piece in pieces)
    return Move(
        deployment=Deployment(plan=after, devices=chosen),
        kept_bytes=total - moved,
        moved_bytes=moved,
        transfers=transfers,
        senders={number: device for device, number in numbers.items()},
    )


def _exchangeable(plan: HeteroPlan, deployment: Deployment) -> dict[tuple[int, int], list[Slot]]:
    """Slots whose devices may change places: of one pool; with tensor parallelism only within a host, which its ranks share."""
    groups: dict[tuple[int, int], list[Slot]] = defaultdict(list)
    hosts = {host: number for number, host in enumerate(sorted({device.host for device in deployment.devices.values()}))}
    for slot, device in sorted(deployment.devices.items()):
        shape = plan.stages[slot.stage].makeup.each()[slot.replica]
        groups[shape.pool, -1 if shape.tp == 1 else hosts[device.host]].append(slot)
    return groups


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Without overlaps: runs that touch are one."""
    found: list[Piece] = []
    for piece in sorted(pieces):
        if found and found[-1].layer == piece.layer and piece.start <= found[-1].stop:
            found[-1] = Piece(piece.layer, found[-1].start, max(found[-1].stop, piece.stop))
        else:
            found.append(piece)
    return found
