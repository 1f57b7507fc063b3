"""Works out what moves when devices of a cluster are lost: what each device holds, which copies there are, and which device sends what.

A slot holds its part of the stage's parameters. The optimizer's state is spread over the replicas of the stage (ZeRO-1). State that only
one host has is copied to another slot. Losing a device loses its slot; the others keep what they hold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from elastic.layout.runs import Run, joined
from elastic.plan.deploy import Deployed, Device, DeviceSlot
from elastic.plan.profiles import Profiles
from elastic.plan.relabel import ByteRange, relabel
from elastic.plan.sending import Balance, balance, missing

OPTIMIZER_BYTES = 2.0
"""Bytes of optimizer state for each byte of parameters: two moments, as in Adam."""


def holdings(deployed: Deployed, profiles: Profiles) -> dict[DeviceSlot, list[ByteRange]]:
    """Returns the bytes of each layer that each slot needs: parameters as layer 2i, optimizer state as layer 2i + 1.

    State that only one host has is also kept by a slot on another host, if there is one.
    """
    found: dict[DeviceSlot, list[ByteRange]] = {}
    single: dict[DeviceSlot, list[ByteRange]] = {}
    for number, stage in enumerate(deployed.division.stages):
        shapes = stage.makeup.each()
        alone = len({device.host for device in deployed.stage(number)}) == 1
        for replica, shape in enumerate(shapes):
            for rank in range(shape.tp):
                slot = DeviceSlot(number, replica, rank)
                parameters, shares = found.setdefault(slot, []), single.setdefault(slot, [])
                for layer in stage.layers:
                    size = int(profiles.bytes[1][layer].parameters)
                    (shares if alone and not replica else parameters).extend(_part(2 * layer, size, rank, shape.tp))
                    shares += _part(2 * layer + 1, int(OPTIMIZER_BYTES * size), replica * shape.tp + rank, len(shapes) * shape.tp)
    slots = sorted(found)
    for place, slot in enumerate(slots):
        for keeper in {slot, _keeper(slot, [*slots[place + 1 :], *slots[:place]], deployed)}:
            found[keeper] = [*found[keeper], *single[slot]]
    return found


def _keeper(slot: DeviceSlot, others: Sequence[DeviceSlot], deployed: Deployed) -> DeviceSlot:
    """Returns the first other slot, from half-way round on, on another host; any other slot if there is no such host; itself if alone."""
    half = len(others) // 2
    turned = [*others[half:], *others[:half]]
    host = deployed.devices[slot].host
    return next((other for other in turned if deployed.devices[other].host != host), turned[0] if turned else slot)


def _part(layer: int, size: int, place: int, parts: int) -> list[ByteRange]:
    start, stop = size * place // parts, size * (place + 1) // parts
    return [ByteRange(layer, start, stop)] if stop > start else []


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A change of plan: the device of each slot afterwards, the bytes kept and moved, the transfers, and how long the busiest link takes.

    Transfers name devices by number; `senders` maps these numbers to devices.
    """

    devices: Mapping[DeviceSlot, Device]
    kept_bytes: int
    moved_bytes: int
    transfers: Balance
    senders: Mapping[int, Device]


def change(before: Deployed, after: Deployed, profiles: Profiles, rates: Mapping[Device, float]) -> Move:
    """Works out the change from `before` to `after`; devices of `after` may exchange their slots so that least moves.

    Slots are exchanged only within a pool, and with tensor parallelism only within a host. `rates` has the bytes a second of each device
    that is left. Raises PlanError if no device is left that has a part of the state.
    """
    gone = set(before.devices.values()) - set(rates)
    had: dict[Device, list[ByteRange]] = {device: [] for device in rates}
    for slot, pieces in holdings(before, profiles).items():
        if (device := before.devices[slot]) not in gone:
            had[device] = _joined([*had[device], *pieces])
    needs = {slot: _joined(pieces) for slot, pieces in holdings(after, profiles).items()}
    numbers = {device: number for number, device in enumerate(sorted(rates))}
    chosen = dict(after.devices)
    for slots in _exchangeable(after).values():
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
        devices=chosen,
        kept_bytes=total - moved,
        moved_bytes=moved,
        transfers=transfers,
        senders={number: device for device, number in numbers.items()},
    )


def _exchangeable(deployed: Deployed) -> dict[tuple[int, int], list[DeviceSlot]]:
    """Groups slots whose devices may be exchanged: of one pool; with tensor parallelism only within a host, which its ranks share."""
    groups: dict[tuple[int, int], list[DeviceSlot]] = defaultdict(list)
    hosts = {host: number for number, host in enumerate(sorted({device.host for device in deployed.devices.values()}))}
    for slot, device in sorted(deployed.devices.items()):
        shape = deployed.division.stages[slot.stage].makeup.each()[slot.replica]
        groups[shape.pool, -1 if shape.tp == 1 else hosts[device.host]].append(slot)
    return groups


def _joined(pieces: Sequence[ByteRange]) -> list[ByteRange]:
    """Joins runs that overlap or touch."""
    layers: dict[int, list[Run]] = defaultdict(list)
    for layer, start, stop in pieces:
        layers[layer].append((start, stop))
    return [ByteRange(layer, start, stop) for layer in sorted(layers) for start, stop in joined(layers[layer])]
