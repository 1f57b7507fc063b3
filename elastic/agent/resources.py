"""What the hosts of a job have for its members: processors, memory without that of spares, and their racks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from elastic.plan.fleet import SHARE
from elastic.plan.site import Site

if TYPE_CHECKING:
    from elastic.agent.hosts import HostCarrier


def site(hosts: Iterable[HostCarrier], members: Iterable[str], threads: int, spare_bytes: int, copies: int = 2) -> Site:
    """Returns the resources for members that use so many `threads`. `members` has the host of each; a spare takes `spare_bytes`. The job
    wants so many `copies` of its state."""
    hosts, at = [*hosts], Counter(members)
    memory = {
        host.name: max(0, host.facts.memory - int(_spares(host, at[host.name]) * spare_bytes / SHARE))
        for host in hosts
        if host.facts.memory is not None
    }
    places = {host.name: host.facts.processors / threads for host in hosts}
    racks = {host.name: host.facts.rack for host in hosts if host.facts.rack is not None}
    return Site(places=places, memory=memory, racks=racks, copies=copies)


def _spares(host: HostCarrier, members: int) -> int:
    """Returns how many processes of a host with so many members are none."""
    return max(0, min(host.spares, host.room + host.spares - members))
