"""Places devices in stages and replica groups on a network whose links differ.

A group holds one stage and exchanges its gradients; consecutive groups pass activations on. Fast links can serve either purpose, and the
best placement lies between "every host is a group" and "every host is spread over all groups".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from elastic.errors import PlanError
from elastic.plan.placement.arrangement import best_path, boundary_bounds
from elastic.plan.placement.exhaustive import every_partition, partitions
from elastic.plan.placement.network import HostNetwork, measured
from elastic.plan.placement.pairing import Matrix, bottleneck_pairing
from elastic.plan.placement.search import Space, best_found

BUDGET = 16_000_000

FEW = 400
"""Up to this many partitions, all are tried instead of a search: the placement is then exact."""

DeviceGroups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Groups of devices in pipeline order, and the seconds of a step's transfers and their two parts.

    `exchange_s` is the gradient exchange of the slowest group, `boundary_s` the sum over all boundaries, forward and back. In groups of
    equal size, members at the same position exchange activations. Raises PlanError if a device has two places, or times do not add up.
    """

    groups: DeviceGroups
    cost_s: float
    exchange_s: float
    boundary_s: float

    def __post_init__(self) -> None:
        devices = [device for group in self.groups for device in group]
        if not self.groups or not all(self.groups):
            raise PlanError(f"a placement needs groups, and each of them a device: {self.groups}")
        if len(set(devices)) < len(devices):
            raise PlanError(f"a device has two places in the groups {self.groups}")
        if not math.isclose(self.cost_s, self.exchange_s + self.boundary_s):
            raise PlanError(f"{self.exchange_s} s of exchange and {self.boundary_s} s of boundaries are not {self.cost_s} s")


def place(
    latency_s: Matrix,
    bytes_per_s: Matrix,
    groups: int,
    exchange_bytes: float,
    boundary_bytes: float,
    *,
    seed: int = 0,
    budget: int = BUDGET,
) -> Placement:
    """Returns the best placement found of all devices in `groups` groups, whose sizes differ by at most one.

    For few devices it is optimal.

    `latency_s` and `bytes_per_s` are (devices, devices); `exchange_bytes` are the gradients of one stage, `boundary_bytes` the activations
    that a member sends on in a step. The cost is defined in `network`; it never exceeds that of the devices in the order given. `budget` is
    the effort, in pairs of devices looked at: the result depends only on the budget and `seed`.
    Raises PlanError on malformed links, on devices that live links do not connect, and if no placement without dead links was found.
    """
    links = measured(latency_s, bytes_per_s, groups, exchange_bytes, boundary_bytes)
    even = _even(links)
    sizes = [len(group) for group in even]
    found = list(every_partition(range(links.devices), sizes)) if partitions(sizes) <= FEW else [even, *_found(links, seed, budget)]
    scored = [_scored(links, candidate) for candidate in found]
    exchange_s, boundary_s, best = min(scored, key=lambda score: (score[0] + score[1], score[2]))
    _refuse_dead(links, best)
    return Placement(
        groups=best,
        cost_s=exchange_s + boundary_s,
        exchange_s=exchange_s,
        boundary_s=boundary_s,
    )


def _even(links: HostNetwork) -> DeviceGroups:
    """Returns groups of the devices in the order given."""
    return tuple(tuple(int(device) for device in run) for run in np.array_split(np.arange(links.devices), links.groups))


def _found(links: HostNetwork, seed: int, budget: int) -> list[DeviceGroups]:
    """Returns the placements found by the search, without blanks: the best few for groups of unequal size, whose costs it approximates."""
    blanks = links.groups * links.lanes - links.devices
    space = Space(links.exchange_s(links.lanes), links.boundary_s, links.groups, blanks)
    best = best_found(space, seed, budget)[: 4 if blanks else 1]
    grids = (devices.reshape(links.groups, -1).tolist() for devices in best)
    return [tuple(tuple(device for device in group if device < links.devices) for group in grid) for grid in grids]


def _scored(links: HostNetwork, groups: DeviceGroups) -> tuple[float, float, DeviceGroups]:
    """Returns seconds of the exchange, of the boundaries in the best order, and the groups in that order; equal-sized ones are paired."""
    filled = np.array([[*group, *group[:1] * (links.lanes - len(group))] for group in groups])
    bounds = boundary_bounds(links.boundary_s, filled)
    path, boundary_s = best_path(bounds, lambda i, j: links.boundary_between(groups[i], groups[j]))
    ordered = [groups[path[0]]]
    for at in path[1:]:
        group = groups[at]
        if len(group) == len(ordered[-1]):
            _, partner = bottleneck_pairing(links.boundary_s[np.ix_(ordered[-1], group)])
            group = tuple(group[column] for column in partner)
        ordered.append(group)
    return max(links.slowest_member(group)[0] for group in groups), 2 * boundary_s, tuple(ordered)


def _refuse_dead(links: HostNetwork, groups: DeviceGroups) -> None:
    """Raises PlanError if a group, or every pairing of two neighbouring ones, uses a dead link."""
    for number, group in enumerate(groups):
        pairs = np.argwhere(links.dead[np.ix_(group, group)])
        if len(pairs):
            one, two = (group[i] for i in pairs[0])
            raise PlanError(f"no placement without dead links was found: group {number} of the best has {one} and {two}, which have none")
    for number, (one, two) in enumerate(pairwise(groups)):
        if links.boundary_between(one, two) >= links.penalty_s:
            raise PlanError(f"no placement without dead links was found: of the best, groups {number} and {number + 1} cannot be paired")
