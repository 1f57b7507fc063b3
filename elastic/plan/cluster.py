"""A cluster: its devices, where they are, and how fast they reach each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from elastic.errors import PlanError
from elastic.plan.curves import Curve, curve_from_json
from elastic.plan.file_fields import item, name, number, positive, sequence, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceKind:
    """A kind of device: memory in bytes; peak FLOPS if known (only used to estimate missing profiles, on request)."""

    name: str
    memory_bytes: float
    flops: float | None = None

    def __post_init__(self) -> None:
        positive(f"memory_bytes of {self.name}", self.memory_bytes)
        if self.flops is not None:
            positive(f"flops of {self.name}", self.flops)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A machine with `count` devices of one kind."""

    name: str
    zone: str
    kind: str
    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise PlanError(f"host {self.name} has {self.count} devices; a host without devices cannot take part")


class LinkEnd(NamedTuple):
    """One end of a link: `devices` devices of a kind at a host. With an empty `host`: any host of the zone, but not the other end's."""

    zone: str
    kind: str
    devices: int = 1
    host: str = ""


class Links(Protocol):
    """How long messages take between two places."""

    def curve(self, sender: LinkEnd, receiver: LinkEnd) -> Curve:
        """Returns the time by size. Raises PlanError if the two are not connected."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """Links by level: a level that is None does not connect."""

    within_host: Curve | None = None
    within_zone: Curve | None = None
    between_zones: Curve | None = None

    def curve(self, sender: LinkEnd, receiver: LinkEnd) -> Curve:
        if sender.host and sender.host == receiver.host:
            level, found = "within_host", self.within_host
        elif sender.zone == receiver.zone:
            level, found = "within_zone", self.within_zone
        else:
            level, found = "between_zones", self.between_zones
        if found is None:
            raise PlanError(f"{_end(sender)} and {_end(receiver)} are not connected: there is no link {level}")
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkMatrix:
    """Links from each place to each other one, regardless of hosts."""

    curves: Mapping[tuple[LinkEnd, LinkEnd], Curve]

    def curve(self, sender: LinkEnd, receiver: LinkEnd) -> Curve:
        found = self.curves.get((sender._replace(host=""), receiver._replace(host="")))
        if found is None:
            raise PlanError(f"{_end(sender)} and {_end(receiver)} are not connected: the matrix has no link between them in this direction")
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Kinds by name, hosts and links. Raises PlanError on no devices, unknown kinds, duplicate host names and hosts without a link."""

    kinds: Mapping[str, DeviceKind]
    hosts: tuple[Host, ...]
    links: Links

    def __post_init__(self) -> None:
        if not self.hosts:
            raise PlanError("a cluster needs at least one host with devices; this one has none")
        names: set[str] = set()
        for host in self.hosts:
            if host.kind not in self.kinds:
                raise PlanError(f"host {host.name} has devices of kind {host.kind}, which is not among the kinds: {sorted(self.kinds)}")
            if host.name in names:
                raise PlanError(f"two hosts have the name {host.name}")
            names.add(host.name)
        self._check_connected()

    @property
    def devices(self) -> int:
        """How many devices there are."""
        return sum(host.count for host in self.hosts)

    def counts(self) -> dict[tuple[str, str], int]:
        """Returns the number of devices by kind and zone, in the order of the hosts."""
        found: dict[tuple[str, str], int] = {}
        for host in self.hosts:
            found[host.kind, host.zone] = found.get((host.kind, host.zone), 0) + host.count
        return found

    def _check_connected(self) -> None:
        """Checks that there are links between every two hosts, by their zone and kind, and within each host of several devices."""
        spots = {(host.zone, host.kind) for host in self.hosts}
        alone = {spot for spot in spots if sum((host.zone, host.kind) == spot for host in self.hosts) == 1}
        for one in sorted(spots):
            for other in sorted(spots):
                if one != other or one not in alone:
                    self.links.curve(LinkEnd(*one), LinkEnd(*other))
        if isinstance(self.links, Levels):
            for host in self.hosts:
                if host.count > 1:
                    place = LinkEnd(host.zone, host.kind, 1, host.name)
                    self.links.curve(place, place)

    @classmethod
    def from_json(cls, data: Any) -> Cluster:
        """Reads a cluster from a file's data. Raises PlanError naming the wrong field."""
        kinds = sequence(item(data, "kinds", "cluster"), "kinds", _kind, " of tables")
        hosts = sequence(item(data, "hosts", "cluster"), "hosts", _host, " of tables")
        return cls(kinds={kind.name: kind for kind in kinds}, hosts=hosts, links=_links(item(data, "links", "cluster")))


def _end(place: LinkEnd) -> str:
    where = f" at {place.host}" if place.host else ""
    return f"{place.devices} {place.kind} in {place.zone}{where}"


def _kind(row: Any, field: str) -> DeviceKind:
    memory_bytes = number(item(row, "memory_bytes", field), f"{field}.memory_bytes")
    flops = number(row["flops"], f"{field}.flops") if "flops" in row else None
    return DeviceKind(name=name(item(row, "name", field), f"{field}.name"), memory_bytes=memory_bytes, flops=flops)


def _host(row: Any, field: str) -> Host:
    names = {key: name(item(row, key, field), f"{field}.{key}") for key in ("name", "zone", "kind")}
    return Host(**names, count=whole(item(row, "count", field), f"{field}.count"))


def _links(data: Any) -> Links:
    if isinstance(data, Mapping) and "matrix" in data:
        return LinkMatrix(curves=dict(sequence(data["matrix"], "links.matrix", _link, " of tables")))
    levels = item(data, "levels", "links")
    names = ("within_host", "within_zone", "between_zones")
    if not isinstance(levels, Mapping) or set(levels) - set(names):
        raise PlanError(f"links.levels must be a table of {', '.join(names)}, not {levels!r}")
    return Levels(**{name: curve_from_json(levels[name], f"links.levels.{name}") for name in names if name in levels})


def _link(row: Any, field: str) -> tuple[tuple[LinkEnd, LinkEnd], Curve]:
    ends: list[LinkEnd] = []
    for key in ("from", "to"):
        end = item(row, key, field)
        if not isinstance(end, list) or len(end) != 3:
            raise PlanError(f"{field}.{key} must be a zone, a kind and a number of devices, not {end!r}")
        ends.append(LinkEnd(str(end[0]), str(end[1]), whole(end[2], f"{field}.{key}[2]")))
    return (ends[0], ends[1]), curve_from_json(row, field)
