"""Finds the best plan for a cluster, and the next one when devices are lost, compared with the alternative of moving nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice, permutations, product

from elastic.errors import PlanError
from elastic.plan.across_zones import across_zones
from elastic.plan.choice import HORIZON, least
from elastic.plan.cluster import Cluster, LinkEnd
from elastic.plan.deploy import Deployed, Device, Unplaceable, deploy, devices, without
from elastic.plan.division.costs import costs
from elastic.plan.division.division import Division
from elastic.plan.division.physical import PhysicalRules
from elastic.plan.division.search import SearchLimits, divide
from elastic.plan.division.shapes import Makeup, Pool, Shape, together
from elastic.plan.moves import Move, change
from elastic.plan.prepared import Prepared
from elastic.plan.profiles import Profiles

ANY = SearchLimits()
MOST_ZONES = 4
"""Zones of one kind up to which the exact search takes only a second or two; with more, only stages across zones are considered."""

_SLOWER = 1.2
_MOST_ORDERS = 24
_MESSAGE_BYTES = 64e6


class WholeHosts(PhysicalRules):
    """Rules without the tensor-parallel degrees that do not divide the devices of every host of their pool."""

    def shapes(self, size: int) -> tuple[Shape, ...]:
        return tuple(shape for shape in super().shapes(size) if self._divides(shape))

    def _divides(self, shape: Shape) -> bool:
        pool = self.pools[shape.pool]
        return all(host.count % shape.tp == 0 for host in self.cluster.hosts if (host.kind, host.zone) == pool[:2])


@dataclass(frozen=True, slots=True, kw_only=True)
class Replanned:
    """The plan after a loss. `stay_s` is a step of the old plan without the replicas that were hit; None if a stage had only such replicas.

    `over_horizon_s` and `stay_over_horizon_s` are the seconds of `horizon` steps, the migration included.
    """

    deployed: Deployed
    move: Move
    stay_s: float | None
    horizon: int

    def over_s(self, horizon: float) -> float:
        return self.deployed.plan.step_s * horizon + self.move.transfers.finish_s

    @property
    def over_horizon_s(self) -> float:
        return self.over_s(self.horizon)

    @property
    def stay_over_horizon_s(self) -> float | None:
        return None if self.stay_s is None else self.stay_s * self.horizon


def plan_for(cluster: Cluster, profiles: Profiles, batch: int, limits: SearchLimits = ANY) -> Deployed:
    """Returns the best plan, with a device for every slot. Raises PlanError, naming the place, if nothing fits."""
    why = "the best of all depths, replicas, degrees and micro-batch sizes"
    rules = PhysicalRules(cluster, profiles)
    across = across_zones(rules, batch, limits, devices(cluster))
    if across is not None and len(rules.pools) > MOST_ZONES:
        return across
    try:
        found = _deployed(rules, divide(rules, batch, limits), why)
    except Unplaceable:
        rules = WholeHosts(cluster, profiles)
        found = _deployed(rules, divide(rules, batch, limits), why + " that divide every host")
    return found if across is None else min(found, across, key=lambda each: each.plan.step_s)


Pools = tuple[Pool, ...]
"""The pools left after a loss. Losses of any device of a pool are the same question."""


def prepare(deployed: Deployed, batch: int, limits: SearchLimits = ANY) -> Prepared[Pools, Division]:
    """Finds divisions for the loss of any one device or host in advance, since searching takes longer than moving."""
    there = devices(deployed.cluster)
    hosts = [{device for device in there if device.host == host.name} for host in deployed.cluster.hosts]
    rules: dict[Pools, PhysicalRules] = {}

    def questions() -> Iterator[Pools]:
        for gone in (*({device} for device in there), *hosts):
            if len(gone) < len(there):
                left = PhysicalRules(without(deployed.cluster, gone), deployed.rules.profiles)
                yield rules.setdefault(left.pools, left).pools

    def dividing(pools: Pools) -> Generator[None, None, Division]:
        yield
        return divide(rules[pools], batch, limits)

    found = Prepared(questions(), dividing)
    while found.advance():
        continue
    return found


def after_loss(
    deployed: Deployed,
    gone: Collection[Device],
    batch: int,
    limits: SearchLimits = ANY,
    horizon: int = HORIZON,
    prepared: Prepared[Pools, Division] | None = None,
) -> Replanned:
    """Chooses the plan without these devices: over `horizon` steps, the better of the best plan and the old one without the hit replicas.

    Divisions in `prepared` are not searched for again. Raises PlanError if nothing fits on the remaining devices, or if only lost devices
    had a part of the state.
    """
    profiles = deployed.rules.profiles
    cluster = without(deployed.cluster, gone)
    rules = WholeHosts(cluster, profiles) if isinstance(deployed.rules, WholeHosts) else PhysicalRules(cluster, profiles)
    rates = _rates(cluster, set(devices(deployed.cluster)) - set(gone))
    kept = _kept(deployed, gone, batch, rules)
    across = across_zones(rules, batch, limits, rates)
    options = [] if across is None else [across]
    if across is None or len(rules.pools) <= MOST_ZONES:
        known = None if prepared is None else prepared.answer(rules.pools)
        found = _placed(rules, known or divide(rules, batch, limits), batch, limits, rates)
        options.append(found)
        for other in _elsewhere(found.division, rules):
            options.append(_deployed(rules, other, "the best for what is left, with its zones exchanged", rates))
    if kept is not None:
        options.append(_deployed(rules, kept, "the previous plan, without the replicas that were hit", rates))

    def moved(option: Deployed) -> Iterator[Replanned]:
        move = change(deployed, option, profiles, rates)
        stay_s = None if kept is None else kept.step_s
        yield Replanned(deployed=option.moved_to(move.devices), move=move, stay_s=stay_s, horizon=horizon)

    fastest_first = sorted(options, key=lambda option: option.plan.step_s)
    best = least(((option.plan.step_s, partial(moved, option)) for option in fastest_first), horizon)
    assert best is not None  # there is at least one option
    return best


def _placed(rules: PhysicalRules, division: Division, batch: int, limits: SearchLimits, rates: Mapping[Device, float]) -> Deployed:
    """Deploys the division; if too few of the remaining devices share a host, deploys another division."""
    try:
        return _deployed(rules, division, "the best for what is left", rates)
    except Unplaceable:
        rules = WholeHosts(rules.cluster, rules.profiles)
        return _deployed(rules, divide(rules, batch, limits), "the best for what is left, with degrees that divide every host", rates)


def _deployed(rules: PhysicalRules, division: Division, why: str, available: Collection[Device] | None = None) -> Deployed:
    cluster = rules.cluster
    placed = deploy(division, cluster, rules.pools, devices(cluster) if available is None else available)
    return Deployed.of(cluster, rules, division, placed, why)


def _kept(deployed: Deployed, gone: Collection[Device], batch: int, rules: PhysicalRules) -> Division | None:
    """Returns the old division with as many replicas as every stage still has; None if a stage has none, or it no longer fits."""
    old, hit = deployed.division, set(gone)
    whole: list[list[int]] = []
    for number, stage in enumerate(old.stages):
        broken = {slot.replica for slot, device in deployed.devices.items() if slot.stage == number and device in hit}
        whole.append([replica for replica in range(stage.makeup.replicas) if replica not in broken])
    count = min(map(len, whole))
    if not count:
        return None
    stages = tuple(
        replace(stage, makeup=_renumbered(deployed.rules, rules, together(stage.makeup.each()[replica] for replica in left[:count])))
        for stage, left in zip(old.stages, whole, strict=True)
    )
    micro_batches = -(-batch // (old.micro_batch * count))
    predicted = costs(rules, stages, old.micro_batch, micro_batches)
    if not predicted.fits:
        return None
    return Division(micro_batch=old.micro_batch, micro_batches=micro_batches, stages=stages, step_s=predicted.step_s, exact=False)


def _renumbered(before: PhysicalRules, after: PhysicalRules, makeup: Makeup) -> Makeup:
    """Returns the same replicas, numbered by the pools of the remaining cluster."""
    numbers = {pool[:2]: number for number, pool in enumerate(after.pools)}
    return together(shape._replace(pool=numbers[before.pools[shape.pool][:2]]) for shape in makeup.each())


def _elsewhere(division: Division, rules: PhysicalRules) -> list[Division]:
    """Returns the division with the zones of each kind exchanged, where that is not much slower: less may have to move."""
    of_kind: dict[str, list[int]] = {}
    for number, pool in enumerate(rules.pools):
        of_kind.setdefault(pool.kind, []).append(number)
    before = [number for numbers in of_kind.values() for number in numbers]
    found: list[Division] = []
    for orders in islice(product(*map(permutations, of_kind.values())), 1, _MOST_ORDERS):
        to = dict(zip(before, chain.from_iterable(orders), strict=True))
        shapes = [[shape._replace(pool=to[shape.pool]) for shape in stage.makeup.each()] for stage in division.stages]
        used = Counter(shape.pool for each in shapes for shape in each for _ in range(shape.tp))
        if any(count > rules.pools[pool].count for pool, count in used.items()):
            continue
        stages = tuple(replace(stage, makeup=together(each)) for stage, each in zip(division.stages, shapes, strict=True))
        predicted = costs(rules, stages, division.micro_batch, division.micro_batches)
        if predicted.fits and predicted.step_s <= division.step_s * _SLOWER:
            found.append(replace(division, stages=stages, step_s=predicted.step_s))
    return found


def _rates(cluster: Cluster, left: Collection[Device]) -> Mapping[Device, float]:
    """Returns the bytes a second of each device for large messages, over the slowest link from its host to another."""
    places = {host.name: LinkEnd(host.zone, host.kind, 1, host.name) for host in cluster.hosts}
    spots = {place._replace(host="") for place in places.values()}  # hosts of a spot have equal links to others
    found: dict[str, float] = {}
    for host in cluster.hosts:
        place = places[host.name]
        others = [*spots, *([place] if host.count > 1 else [])]
        seconds: list[float] = []
        for other in others:
            try:
                seconds.append(float(cluster.links.curve(place, other).seconds(_MESSAGE_BYTES)))
            except PlanError:  # not connected: nothing is sent there
                continue
        found[host.name] = _MESSAGE_BYTES / max(seconds) if seconds else _MESSAGE_BYTES
    return {device: found[device.host] for device in left}
