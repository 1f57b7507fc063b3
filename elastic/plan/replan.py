"""A plan for a cluster, and the next one when devices are lost: compared with what could be done without moving anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice, permutations, product

from elastic.errors import PlanError
from elastic.plan.cluster import Cluster, Place
from elastic.plan.deploy import Deployment, Device, Move, Slot, Unplaceable, change, deploy, devices, without
from elastic.plan.hetero.physical import PhysicalRules
from elastic.plan.hetero.plan import HeteroPlan
from elastic.plan.hetero.predict import Prediction, predict
from elastic.plan.hetero.search import Limits, partition
from elastic.plan.hetero.shapes import Makeup, Pool, Shape, together
from elastic.plan.plan import Plan, Stage
from elastic.plan.planner import HORIZON
from elastic.plan.profiles import Profiles
from elastic.plan.routing import even_routes
from elastic.plan.saved import SavedPlan
from elastic.plan.workload import MOST_GRAINS

ANY = Limits()
_SLOWER = 1.2
_MOST_ORDERS = 24
_MESSAGE_BYTES = 64e6


class WholeHosts(PhysicalRules):
    """Without degrees of tensor parallelism that do not divide the devices of every host of their pool."""

    def shapes(self, size: int) -> tuple[Shape, ...]:
        return tuple(shape for shape in super().shapes(size) if self._divides(shape))

    def _divides(self, shape: Shape) -> bool:
        pool = self.pools[shape.pool]
        return all(host.count % shape.tp == 0 for host in self.cluster.hosts if (host.kind, host.zone) == pool[:2])


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan with its devices, what it costs, and why it is this one."""

    cluster: Cluster
    rules: PhysicalRules
    deployment: Deployment
    prediction: Prediction
    why: str

    @property
    def plan(self) -> HeteroPlan:
        return self.deployment.plan

    @property
    def bottleneck(self) -> int:
        """The stage that the others wait for."""
        return max(range(len(self.plan.stages)), key=lambda number: self.prediction.stage_s[number])

    @property
    def idle(self) -> list[Device]:
        """The devices that it does not use."""
        return sorted(set(devices(self.cluster)) - set(self.deployment.devices.values()))

    def saved(self) -> SavedPlan:
        """For a file: its members are the used devices, in the order of the hosts; a replica takes consecutive grains."""
        used = set(self.deployment.devices.values())
        there = [device for device in devices(self.cluster) if device in used]
        number = {device: place for place, device in enumerate(there)}
        plan, layers = self.plan, self.rules.profiles.bytes[1]
        stages: list[Stage] = []
        for depth, stage in enumerate(plan.stages):
            groups = [
                tuple(number[self.deployment.devices[Slot(depth, replica, rank)]] for rank in range(shape.tp))
                for replica, shape in enumerate(stage.makeup.each())
            ]
            together = any(len(group) > 1 for group in groups)
            members = tuple(group[0] for group in groups)
            stages.append(Stage(layers=stage.layers, members=members, groups=tuple(groups) if together else ()))
        grains = _grains(plan.micro_batches * plan.replicas, plan.replicas)
        return SavedPlan(
            plan=Plan(
                stages=tuple(stages),
                routes=tuple(even_routes(grains, stage.members) for stage in stages),
                step_s=self.prediction.step_s,
                why=self.why,
            ),
            hosts=tuple(device.host for device in there),
            parameter_bytes=tuple(round(layer.parameters) for layer in layers),
            micro_batches=plan.micro_batches * plan.replicas,
            micro_batch=plan.micro_batch,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Replanned:
    """What follows a loss. `stay_s` is a step of the old plan without the replicas that were hit, None if a stage had no other.

    `over_horizon_s` and `stay_over_horizon_s` are the seconds of so many steps, the migration included.
    """

    planned: Planned
    move: Move
    stay_s: float | None
    horizon: int

    @property
    def over_horizon_s(self) -> float:
        return self.planned.prediction.step_s * self.horizon + self.move.transfers.finish_s

    @property
    def stay_over_horizon_s(self) -> float | None:
        return None if self.stay_s is None else self.stay_s * self.horizon


def plan_for(cluster: Cluster, profiles: Profiles, batch: int, limits: Limits = ANY) -> Planned:
    """The best plan, with a device for every slot. Raises PlanError if nothing fits, saying where."""
    why = "the best of all depths, replicas, degrees and micro-batch sizes"
    rules = PhysicalRules(cluster, profiles)
    try:
        return _planned(cluster, rules, partition(rules, batch, limits), why)
    except Unplaceable:
        rules = WholeHosts(cluster, profiles)
        return _planned(cluster, rules, partition(rules, batch, limits), why + " that divide every host")


Prepared = Mapping[tuple[Pool, ...], HeteroPlan | None]
"""The best plan by what is left, None where nothing fits. Pools tell what is left: which device of one is lost makes no difference."""


def prepare(planned: Planned, batch: int, limits: Limits = ANY) -> dict[tuple[Pool, ...], HeteroPlan | None]:
    """Plans for the loss of any one device, and of any one host: found before it happens, since to search takes longer than to move."""
    there = devices(planned.cluster)
    hosts = [{device for device in there if device.host == host.name} for host in planned.cluster.hosts]
    found: dict[tuple[Pool, ...], HeteroPlan | None] = {}
    for gone in (*({device} for device in there), *hosts):
        if len(gone) == len(there):
            continue
        rules = PhysicalRules(without(planned.cluster, gone), planned.rules.profiles)
        if rules.pools not in found:
            try:
                found[rules.pools] = partition(rules, batch, limits)
            except PlanError:
                found[rules.pools] = None
    return found


def after_loss(
    planned: Planned,
    gone: Collection[Device],
    batch: int,
    limits: Limits = ANY,
    horizon: int = HORIZON,
    prepared: Prepared | None = None,
) -> Replanned:
    """What to do without these devices: the better, over so many steps, of the best plan, and of the old one without what was hit.

    What is `prepared` is not searched for again. Raises PlanError if nothing fits on what is left, or a part of the state was only on these
    devices.
    """
    profiles = planned.rules.profiles
    cluster = without(planned.cluster, gone)
    rules = WholeHosts(cluster, profiles) if isinstance(planned.rules, WholeHosts) else PhysicalRules(cluster, profiles)
    rates = _rates(cluster, set(devices(planned.cluster)) - set(gone))
    kept = _kept(planned, gone, batch, rules)
    found = _placed(cluster, rules, (prepared or {}).get(rules.pools) or partition(rules, batch, limits), batch, limits, rates)
    options = [found]
    for other in _elsewhere(found.plan, rules):
        options.append(_planned(cluster, rules, other, "the best for what is left, with its zones exchanged", rates))
    if kept is not None:
        options.append(_planned(cluster, rules, kept, "the plan of before, without the replicas that were hit", rates))
    best: Replanned | None = None
    for option in sorted(options, key=lambda option: option.prediction.step_s):
        if best is not None and option.prediction.step_s * horizon >= best.over_horizon_s:
            break
        move = change(planned.deployment, option.plan, option.deployment, profiles, rates)
        there = Replanned(
            planned=replace(option, deployment=move.deployment), move=move, stay_s=None if kept is None else kept.step_s, horizon=horizon
        )
        if best is None or there.over_horizon_s < best.over_horizon_s:
            best = there
    assert best is not None  # there is at least one option
    return best


def _placed(cluster: Cluster, rules: PhysicalRules, plan: HeteroPlan, batch: int, limits: Limits, rates: Mapping[Device, float]) -> Planned:
    """With devices; another plan, where those that are left are in the wrong hosts for this one."""
    try:
        return _planned(cluster, rules, plan, "the best for what is left", rates)
    except Unplaceable:
        rules = WholeHosts(cluster, rules.profiles)
        why = "the best for what is left, with degrees that divide every host"
        return _planned(cluster, rules, partition(rules, batch, limits), why, rates)


def _planned(cluster: Cluster, rules: PhysicalRules, plan: HeteroPlan, why: str, available: Collection[Device] | None = None) -> Planned:
    prediction = predict(rules, plan.stages, plan.micro_batch, plan.micro_batches)
    deployment = deploy(plan, cluster, rules.pools, devices(cluster) if available is None else available)
    slowest = max(range(len(plan.stages)), key=lambda number: prediction.stage_s[number])
    layers = plan.stages[slowest].layers
    told = (
        f"{why}: stage {slowest} (layers {layers.start} to {layers.stop - 1}) is the bottleneck with {prediction.stage_s[slowest]:.3g} s a "
        f"micro-batch, of {plan.micro_batches}; gradients take {prediction.sync_s:.3g} s"
    )
    return Planned(cluster=cluster, rules=rules, deployment=deployment, prediction=prediction, why=told)


def _grains(micro_batches: int, replicas: int) -> int:
    """As many as a trainer takes by default, where every replica can have equally many of these; else the most up to that, or one each."""
    counts = range(replicas, max(MOST_GRAINS, replicas) + 1, replicas)
    return max(grains for grains in counts if micro_batches % grains == 0)


def _kept(planned: Planned, gone: Collection[Device], batch: int, rules: PhysicalRules) -> HeteroPlan | None:
    """The old plan with as many replicas as every stage still has; None if one has none, or it does not fit any more."""
    plan, hit = planned.plan, set(gone)
    whole: list[list[int]] = []
    for number, stage in enumerate(plan.stages):
        broken = {slot.replica for slot, device in planned.deployment.devices.items() if slot.stage == number and device in hit}
        whole.append([replica for replica in range(stage.makeup.replicas) if replica not in broken])
    count = min(map(len, whole))
    if not count:
        return None
    stages = tuple(
        replace(stage, makeup=_renumbered(planned.rules, rules, together(stage.makeup.each()[replica] for replica in left[:count])))
        for stage, left in zip(plan.stages, whole, strict=True)
    )
    kept = HeteroPlan(
        micro_batch=plan.micro_batch,
        micro_batches=-(-batch // (plan.micro_batch * count)),
        stages=stages,
        step_s=0.0,
        exact=False,
    )
    prediction = predict(rules, stages, kept.micro_batch, kept.micro_batches)
    return replace(kept, step_s=prediction.step_s) if prediction.fits else None


def _renumbered(before: PhysicalRules, after: PhysicalRules, makeup: Makeup) -> Makeup:
    """The same replicas by the pools of the cluster that is left."""
    numbers = {pool[:2]: number for number, pool in enumerate(after.pools)}
    return together(shape._replace(pool=numbers[before.pools[shape.pool][:2]]) for shape in makeup.each())


def _elsewhere(plan: HeteroPlan, rules: PhysicalRules) -> list[HeteroPlan]:
    """The same plan with the zones of each kind exchanged, where that is not much slower: less may have to move."""
    of_kind: dict[str, list[int]] = {}
    for number, pool in enumerate(rules.pools):
        of_kind.setdefault(pool.kind, []).append(number)
    before = [number for numbers in of_kind.values() for number in numbers]
    found: list[HeteroPlan] = []
    for orders in islice(product(*map(permutations, of_kind.values())), 1, _MOST_ORDERS):
        to = dict(zip(before, chain.from_iterable(orders), strict=True))
        shapes = [[shape._replace(pool=to[shape.pool]) for shape in stage.makeup.each()] for stage in plan.stages]
        used = Counter(shape.pool for each in shapes for shape in each for _ in range(shape.tp))
        if any(count > rules.pools[pool].count for pool, count in used.items()):
            continue
        stages = tuple(replace(stage, makeup=together(each)) for stage, each in zip(plan.stages, shapes, strict=True))
        prediction = predict(rules, stages, plan.micro_batch, plan.micro_batches)
        if prediction.fits and prediction.step_s <= plan.step_s * _SLOWER:
            found.append(replace(plan, stages=stages, step_s=prediction.step_s))
    return found


def _rates(cluster: Cluster, left: Collection[Device]) -> Mapping[Device, float]:
    """Bytes a second at which each device sends and receives large messages: over the slowest link that its host has to another."""
    places = {host.name: Place(host.zone, host.kind, 1, host.name) for host in cluster.hosts}
    spots = {place._replace(host="") for place in places.values()}  # hosts of a spot are alike to others
    found: dict[str, float] = {}
    for host in cluster.hosts:
        place = places[host.name]
        others = [*spots, *([place] if host.count > 1 else [])]
        seconds: list[float] = []
        for other in others:
            try:
                seconds.append(float(cluster.links.curve(place, other).seconds(_MESSAGE_BYTES)))
            except PlanError:  # not connected: nothing goes that way
                continue
        found[host.name] = _MESSAGE_BYTES / max(seconds) if seconds else _MESSAGE_BYTES
    return {device: found[device.host] for device in left}
