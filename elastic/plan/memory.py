"""Bytes that a worker must hold as a member of a stage: the sum of the copies that `docs/design.md` lists.

Where layers compute on a device, most of it lies in the device's memory; the host has the copies of the owned shards and what passes
through it to and from links. Each is compared with its own limit.

Everything but activations is spread evenly over the members, as in layouts. Activations are those of the micro-batches that 1F1B has in
flight: S - s of them at stage s of S, and one more at stages other than the first if backwards are split. Source of this bound: Narayanan
et al., "Memory-Efficient Pipeline-Parallel DNN Training" (2021). Where micro-batches are dealt out, there may be more of them, and more
sums of gradients (`elastic.plan.dealing`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from elastic.errors import PlanError
from elastic.plan import dealing
from elastic.plan.fleet import Fleet
from elastic.plan.plan import Order, Stage
from elastic.plan.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Bytes of one worker: the stage's parameters, trained or not; optimizer states of what it owns, their copy from the step before, and
    an older one that is kept; replicas with their previous copies and updates; gradient sums, its own and received; activations in flight,
    with their inputs. If it computes on a device, there are copies of two steps, and one of what is not trained. They and `staging` (what
    links receive before it is copied to the device, and what they send) lie on the host, the rest on the device: also what an `update`
    makes of all owned parameters at once."""

    parameters: float
    states: float
    previous_copy: float
    kept_copy: float
    replicas: float
    gradients: float
    activations: float
    update: float = 0.0
    staging: float = 0.0
    on_device: bool = False

    @property
    def total(self) -> float:
        """Bytes on the host and on the device."""
        return sum(getattr(self, part) for part in _ON_DEVICE + _ON_HOST)

    @property
    def device_bytes(self) -> float:
        """Bytes in the memory of the worker's device; 0 on the CPU."""
        return sum(getattr(self, part) for part in _ON_DEVICE) if self.on_device else 0.0

    @property
    def host_bytes(self) -> float:
        """Bytes in the memory of the worker's host."""
        return sum(getattr(self, part) for part in _ON_HOST) if self.on_device else self.total

    def described(self, *, on_device: bool) -> str:
        """Names the parts that lie on the device, or on the host, with their sizes."""
        parts = _PARTS if not self.on_device else _ON_DEVICE if on_device else _ON_HOST
        return ", ".join(f"{readable(getattr(self, part))} {part.replace('_', ' ')}" for part in parts if getattr(self, part))

    def __str__(self) -> str:
        return self.described(on_device=False)


_ON_DEVICE = ("parameters", "states", "replicas", "gradients", "activations", "update")
_ON_HOST = ("previous_copy", "kept_copy", "staging")
_PARTS = ("parameters", "states", "previous_copy", "kept_copy", "replicas", "gradients", "activations")


def need(
    workload: Workload,
    layers: range,
    members: int,
    workers: int,
    ahead: int,
    grains: int,
    *,
    sums: int | None = None,
    replicas: int = 1,
    outlive: bool = False,
    split: bool = False,
    on_device: bool = False,
) -> Need:
    """Returns the need of one member of a stage with `members` of all `workers`, computing `grains`.

    `ahead` micro-batches are in flight: S - s where they are not dealt out. `sums` of gradients are held at once; None: those of
    the first grains in ascending order, the fewest. If a grain has several micro-batches, there is also the gradient that is added.

    If state may `outlive` its process, sums of gradients are not written to in place, which takes one more of each vector; sums `on_device`
    never outlive it.
    Its `replicas` of others' state are an even share of all replicas: a lower bound, which needs no other stages.
    """
    costs = [workload.layers[layer] for layer in layers]
    parameters = sum(cost.parameter_bytes for cost in costs)
    states = sum(workload.state_bytes_of(layer) for layer in layers)
    frozen, share = sum(cost.frozen_bytes for cost in costs), 1 / members
    in_flight = min(ahead + (split and layers.start > 0), grains * (workload.micro_batches // workload.grains))
    entering = workload.layers[layers.start - 1].output_bytes if layers.start else 0
    received = parameters * share * max(1, members - 1)
    kept, added = subtrees(grains) if sums is None else sums, 0
    if grains and workload.micro_batches > workload.grains:  # what is added to the sum of a grain: in the first stage layer by layer
        added = parameters if layers.start else max(cost.parameter_bytes for cost in costs)
    return Need(
        parameters=parameters + frozen,
        states=states * share,
        previous_copy=((parameters + states) * (1 + on_device) + frozen * on_device) * share,
        kept_copy=(parameters + states) * share if on_device or (replicas and workers > 1) else 0.0,
        replicas=replicas * copied_bytes(workload, range(len(workload.layers))) / workers if workers > 1 else 0.0,
        gradients=parameters * (kept + (outlive and not on_device and grains > 1)) + added + received,
        activations=in_flight * (sum(cost.activation_bytes for cost in costs) + entering),
        update=parameters * share if on_device else 0.0,  # torch's optimizers update tensors of a device together (foreach)
        staging=(parameters + received + in_flight * entering if workers > 1 else 0.0) if on_device else 0.0,
        on_device=on_device,
    )


def needs(
    workload: Workload,
    stages: Sequence[Stage],
    routes: Sequence[Sequence[int]],
    *,
    replicas: int = 1,
    outlive: bool = False,
    split: bool = False,
    dealt: bool = False,
    eager: int = 0,
    on_device: bool = False,
) -> dict[int, Need]:
    """Returns the need of every worker of a plan. A replica is as large as its owner's part: most if the owner is alone in its stage."""
    workers = sum(len(stage.members) for stage in stages)
    owned = [(copied_bytes(workload, stage.layers) / len(stage.members), number) for number, stage in enumerate(stages)]
    found: dict[int, Need] = {}
    ahead, sums = dealing.bounds(routes, dealt=dealt, eager=eager), dealing.sums(workload, routes, dealt=dealt)
    for number, (stage, route) in enumerate(zip(stages, routes, strict=True)):
        largest = max((size for size, other in owned if other != number or len(stage.members) > 1), default=0.0)
        grains, alike = Counter(route), dict[tuple[int, int], Need]()
        for worker in stage.members:
            same = grains[worker], sums[number].get(worker, 0)
            if same not in alike:
                kept = {"replicas": replicas, "outlive": outlive, "split": split, "on_device": on_device}
                mean = need(workload, stage.layers, len(stage.members), workers, ahead[number], same[0], sums=same[1], **kept)
                alike[same] = replace(mean, replicas=max(mean.replicas, replicas * largest))
            found[worker] = alike[same]
    return found


def copied_bytes(workload: Workload, layers: range) -> float:
    """Returns the bytes of a replica of whole layers: parameters and states, those of the step before, and gradients to update them; and
    what is not trained."""
    costs = [workload.layers[layer] for layer in layers]
    trained = sum(3 * workload.layers[layer].parameter_bytes + 2 * workload.state_bytes_of(layer) for layer in layers)
    return trained + sum(cost.frozen_bytes for cost in costs)


def subtrees(grains: int) -> int:
    """Returns the most subtree sums that wait at once when so many consecutive grains are folded one by one."""
    return max((i.bit_count() + 1 for i in range(grains)), default=0)


def shortfall(
    workload: Workload,
    stages: Sequence[Stage],
    routes: Sequence[Sequence[int]],
    fleet: Fleet,
    *,
    split: bool = False,
    dealt: bool = False,
    eager: int = 0,
) -> tuple[float, str]:
    """Returns the bytes that the worker with the largest shortfall lacks, of its host's memory or its device's, and a sentence about it;
    0 and an empty sentence if all fit."""
    worst, problem = 0.0, ""
    if not fleet.memory and not fleet.on_device:
        return worst, problem
    for worker, needed in needs_in(workload, stages, routes, fleet, split=split, dealt=dealt, eager=eager).items():
        for on_device, limits in ((False, fleet.memory), (True, fleet.device_memory)):
            lacking = (needed.device_bytes if on_device else needed.host_bytes) - limits.get(worker, math.inf)
            if lacking > worst:
                worst, problem = lacking, _lacks(stages, worker, needed, limits[worker], on_device=on_device)
    return worst, problem


def needs_in(
    workload: Workload,
    stages: Sequence[Stage],
    routes: Sequence[Sequence[int]],
    fleet: Fleet,
    *,
    split: bool = False,
    dealt: bool = False,
    eager: int = 0,
) -> dict[int, Need]:
    """Returns the need of every worker of a plan, with the copies that this fleet keeps."""
    order = Order(split=split, dealt=dealt, eager=eager)
    return needs(workload, stages, routes, replicas=fleet.replicas, outlive=fleet.outlive, on_device=fleet.on_device, **order)


def _lacks(stages: Sequence[Stage], worker: int, needed: Need, limit: int, *, on_device: bool) -> str:
    number = next(number for number, stage in enumerate(stages) if worker in stage.members)
    layers, bytes_ = stages[number].layers, needed.device_bytes if on_device else needed.host_bytes
    what, has = ("of device memory ", "may use of its device") if on_device else ("", "has besides its process")
    return (
        f"stage {number} (layers {layers.start} to {layers.stop - 1}) needs {readable(bytes_)} {what}on worker {worker}, which is "
        f"{round(bytes_ - limit)} bytes more than the {readable(limit)} it {has} ({needed.described(on_device=on_device)})"
    )


def refuse(count: str, said: str, *, on_device: bool = False) -> PlanError:
    """Returns the error to raise if no plan fits."""
    give = "Use devices with more memory, or fewer workers a device" if on_device else "Give workers more memory="
    return PlanError(
        f"the model does not fit into memory in {count}. In the closest plan, {said}. {give}, use more workers or stages, smaller "
        "micro-batches, or checkpoint_activations=True"
    )


def readable(size: float) -> str:
    """Formats a size in decimal units, such as `1.5 GB`."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        del units[0]
    return f"{size:.3g} {units[0]}"
