"""The cost of a placement: checks the links of a network, converts them to seconds per pair of devices, and measures groups exactly.

The cost model is that of DT-FM (Yuan et al., "Decentralized Training of Foundation Models in Heterogeneous Environments", 2022). Groups
exchange gradients at the same time, so the slowest member of the slowest group counts. Activations pass from group to group, so boundaries
add up: each is as slow as the slowest link of the best pairing, once forward and once back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elastic.errors import PlanError
from elastic.plan.placement.pairing import Matrix, bottleneck_pairing, uneven_pairing_s

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostNetwork:
    """Seconds between any two devices, (devices, devices), symmetric; `dead` marks pairs without a link, whose seconds are `penalty_s`.

    An exchange of b bytes in a group of n takes `2 latency_s + byte_s / n` per pair; a boundary takes `boundary_s`.
    """

    latency_s: Matrix
    byte_s: Matrix
    boundary_s: Matrix
    dead: Mask
    penalty_s: float
    groups: int

    @property
    def devices(self) -> int:
        """Number of devices."""
        return len(self.latency_s)

    @property
    def lanes(self) -> int:
        """Members of the largest groups; the others have one less."""
        return -(-self.devices // self.groups)

    def exchange_s(self, members: int) -> Matrix:
        """Returns the seconds that each member of a group of this size spends on each other member."""
        return 2 * self.latency_s + self.byte_s / members

    def slowest_member(self, group: Sequence[int]) -> tuple[float, int]:
        """Returns the seconds of a group's exchange, and its slowest device."""
        within = np.ix_(group, group)
        seconds = (2 * self.latency_s[within] + self.byte_s[within] / len(group)).sum(axis=1)
        return float(seconds.max()), group[int(seconds.argmax())]

    def boundary_between(self, one: Sequence[int], two: Sequence[int]) -> float:
        """Returns the slowest link of the best pairing of two groups, in seconds for one direction."""
        larger, smaller = (one, two) if len(one) >= len(two) else (two, one)
        costs = self.boundary_s[np.ix_(larger, smaller)]
        return bottleneck_pairing(costs)[0] if len(one) == len(two) else uneven_pairing_s(costs)


def measured(latency_s: Matrix, bytes_per_s: Matrix, groups: int, exchange_bytes: float, boundary_bytes: float) -> HostNetwork:
    """Checks the measured links and converts them to seconds.

    A link that differs by direction counts as the mean of both, since every cost uses a pair once in each direction. The diagonals are
    ignored. A bandwidth of 0 is a dead link. Raises PlanError on wrong shapes or signs, NaN, and devices that live links do not connect.
    """
    latency, bandwidth = _checked("latency_s", latency_s), _checked("bytes_per_s", bytes_per_s, infinite=True)
    devices = len(latency)
    if bandwidth.shape != latency.shape:
        raise PlanError(f"latency_s is of {devices} devices and bytes_per_s of {len(bandwidth)}: both must have the same number")
    if not 1 <= groups <= devices:
        raise PlanError(f"{devices} devices cannot make {groups} groups: there must be at least one group, and a device for each")
    for name, size in (("exchange_bytes", exchange_bytes), ("boundary_bytes", boundary_bytes)):
        if not (np.isfinite(size) and size >= 0):
            raise PlanError(f"{name} is {size}; it must be finite and not negative")
    dead = (bandwidth == 0) | (bandwidth.T == 0)
    np.fill_diagonal(dead, False)
    _connected(~dead)
    pace = np.divide(1.0, bandwidth, out=np.zeros_like(bandwidth), where=bandwidth > 0)
    latency, pace = (latency + latency.T) / 2, (pace + pace.T) / 2
    byte_s, boundary_s = 2 * exchange_bytes * pace, latency + boundary_bytes * pace
    # More than the cost of any placement without a dead link, so that dead links are used only if nothing else is possible.
    penalty = 2 * devices * float((2 * latency + byte_s + boundary_s).max()) + 1
    latency, boundary_s = np.where(dead, penalty, latency), np.where(dead, penalty, boundary_s)
    for matrix in (latency, byte_s, boundary_s):
        np.fill_diagonal(matrix, 0)
    return HostNetwork(latency_s=latency, byte_s=byte_s, boundary_s=boundary_s, dead=dead, penalty_s=penalty, groups=groups)


def _checked(name: str, values: Matrix, *, infinite: bool = False) -> Matrix:
    """Returns a copy as floats, with ones on the diagonal."""
    matrix = np.array(values, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise PlanError(f"{name} has shape {matrix.shape}; it must be (devices, devices)")
    if not len(matrix):
        raise PlanError(f"{name} has no devices: there is nothing to place")
    np.fill_diagonal(matrix, 1.0)
    bad = ~(matrix >= 0) | (np.isinf(matrix) & (not infinite))
    if bad.any():
        one, two = np.argwhere(bad)[0]
        rule = "not negative" if infinite else "finite and not negative"
        raise PlanError(f"{name} from device {one} to {two} is {matrix[one, two]}; it must be {rule}: measure the link again")
    return matrix


def _connected(alive: Mask) -> None:
    """Raises PlanError unless live links join all devices: groups and their neighbours must all reach one another."""
    reached = np.zeros(len(alive), dtype=bool)
    reached[0] = True
    frontier = reached
    while frontier.any():
        frontier = alive[frontier].any(axis=0) & ~reached
        reached = reached | frontier
    if not reached.all():
        lost = np.flatnonzero(~reached)
        some = ", ".join(map(str, lost[:8])) + (", ..." if len(lost) > 8 else "")
        raise PlanError(f"no live link joins devices {some} to device 0 ({len(lost)} of {len(alive)}): a placement needs all connected")
