"""The site of a job: how many workers each host can compute for at the same time, how fast messages pass between hosts, and racks.

For a pair of hosts that was not measured yet a default is assumed; plans report this.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

from elastic.errors import PlanError

Pair = tuple[str, str]
"""Two hosts in alphabetical order, or one host twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpeed:
    """The speed of a link: a message of n bytes takes `latency_s + n / bytes_per_s`. `measured` is False if this is assumed."""

    latency_s: float
    bytes_per_s: float
    measured: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.latency_s) and self.latency_s >= 0 and math.isfinite(self.bytes_per_s) and self.bytes_per_s > 0):
            raise PlanError(f"a link of {self.bytes_per_s} bytes/s with a latency of {self.latency_s} s is impossible: measure it again")

    def seconds(self, size: float) -> float:
        """Returns the seconds of a message of `size` bytes; 0 for 0 bytes."""
        return self.latency_s + size / self.bytes_per_s if size else 0.0

    def slower(self, other: LinkSpeed) -> LinkSpeed:
        """Returns the worse of both links in each respect."""
        return LinkSpeed(
            latency_s=max(self.latency_s, other.latency_s),
            bytes_per_s=min(self.bytes_per_s, other.bytes_per_s),
            measured=self.measured and other.measured,
        )


WITHIN = LinkSpeed(latency_s=1e-4, bytes_per_s=2e9, measured=False)
"""Assumed between workers of one host: UNIX sockets."""

BETWEEN = LinkSpeed(latency_s=2e-4, bytes_per_s=1e9, measured=False)
"""Assumed between hosts: a network of 10 Gbit/s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Links by pair of hosts; `places`: how many workers of a host can compute at the same time; `memory`: bytes of a host. A host that is
    not listed is unlimited. `racks` has the rack of each host that has named one: hosts of a rack may be lost together. `copies` is how
    many copies of the state the job wants in all, each on another host."""

    links: Mapping[Pair, LinkSpeed] = field(default_factory=dict)
    places: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, int] = field(default_factory=dict)
    racks: Mapping[str, str] = field(default_factory=dict)
    copies: int = 2

    def __post_init__(self) -> None:
        if bad := {host: places for host, places in self.places.items() if not places > 0}:
            raise PlanError(f"hosts must have room for a worker to compute; these have none: {bad}")
        if self.copies < 1:
            raise PlanError(f"{self.copies} copies of the state: there is at least its owner's")

    def link(self, one: str, other: str) -> LinkSpeed:
        """Returns the link between a worker on the host `one` and another on `other`, which may be the same host."""
        return self.links.get(pair(one, other), WITHIN if one == other else BETWEEN)

    def slowest(self, some: Collection[str], others: Collection[str]) -> LinkSpeed:
        """Returns the worst link between a host of `some` and one of `others`."""
        one, other = frozenset(some), frozenset(others)
        both = one & other
        found = [self.links.get((host, host), WITHIN) for host in both]
        found += self._between(one, other)
        pairs = len(one) * len(other) - len(both) * (len(both) - 1) // 2  # each pair counted once, also a host with itself
        if len(found) < pairs:
            found.append(BETWEEN)  # some were not measured
        return reduce(LinkSpeed.slower, found) if found else WITHIN

    def _between(self, one: Collection[str], other: Collection[str]) -> list[LinkSpeed]:
        """Returns the measured links between two hosts, one of each set."""
        if len(one) * len(other) < len(self.links):
            pairs = {pair(a, b) for a in one for b in other if a != b}
            return [self.links[hosts] for hosts in pairs if hosts in self.links]
        return [link for (a, b), link in self.links.items() if a != b and ((a in one and b in other) or (b in one and a in other))]

    def knowing(self, links: Mapping[Pair, LinkSpeed]) -> Site:
        """Returns the site with these measured links added or replaced."""
        return replace(self, links={**self.links, **links})

    def having(self, hosts: Site) -> Site:
        """Returns the site with the places, memory and racks of these hosts added or replaced."""
        places, memory = {**self.places, **hosts.places}, {**self.memory, **hosts.memory}
        return replace(self, places=places, memory=memory, racks={**self.racks, **hosts.racks})

    def apart(self, hosts: Mapping[int, str]) -> dict[int, str]:
        """Returns for each worker, given its host, the place that no copy of its state shares with it.

        That is its rack if there are several among the `hosts`, else its host. A host that has named no rack is a rack of its own.
        """
        racks = {host: f"rack {self.racks[host]}" if host in self.racks else f"host {host}" for host in hosts.values()}
        several = len(set(racks.values())) > 1
        return {worker: racks[host] if several else f"host {host}" for worker, host in hosts.items()}

    def renamed(self, names: Mapping[str, str]) -> Site:
        """Returns the site of the hosts in `names` alone, under these names; without racks, which no plan depends on."""
        return Site(
            links={pair(names[one], names[other]): link for (one, other), link in self.links.items() if one in names and other in names},
            places={names[host]: places for host, places in self.places.items() if host in names},
            memory={names[host]: memory for host, memory in self.memory.items() if host in names},
            copies=self.copies,
        )

    def to_json(self) -> dict[str, Any]:
        """Returns JSON types only; `from_json` returns an equal site."""
        links = [[*hosts, link.latency_s, link.bytes_per_s] for hosts, link in sorted(self.links.items())]
        found = {"links": links, "places": dict(self.places), "memory": dict(self.memory), "racks": dict(self.racks)}
        return {**found, "copies": self.copies}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Site:
        """The inverse of `to_json`."""
        links = {pair(one, other): LinkSpeed(latency_s=latency, bytes_per_s=rate) for one, other, latency, rate in data["links"]}
        return cls(links=links, places=data["places"], memory=data["memory"], racks=data["racks"], copies=data["copies"])


def pair(one: str, other: str) -> Pair:
    """Returns the key of the link between two hosts."""
    return (one, other) if one <= other else (other, one)
