"""Speeds of links between hosts, as workers measure them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from elastic.plan.site import LinkSpeed, Pair, Site, pair


class LinkFigures:
    """The newest measurements of each link between two workers."""

    def __init__(self) -> None:
        self._told: dict[tuple[int, int], tuple[float | None, float | None]] = {}

    def note(self, worker: int, rows: Iterable[Sequence[float | None]]) -> None:
        """Records a worker's measurements, rows `[peer, latency_s, bytes_per_s]`; None where a value is unknown."""
        for peer, latency_s, bytes_per_s in rows:
            if peer is not None:
                self._told[worker, int(peer)] = latency_s, bytes_per_s

    def keep(self, workers: Iterable[int]) -> None:
        """Drops the links of workers that are not among these."""
        kept = set(workers)
        self._told = {link: told for link, told in self._told.items() if kept.issuperset(link)}

    def links(self, hosts: Mapping[int, str], site: Site) -> dict[Pair, LinkSpeed]:
        """Returns the speed for each pair of hosts between which large messages have passed; `hosts` maps members to hosts.

        Measured rates are lower bounds of a link's rate, and measured latencies are upper bounds. So a pair gets the best values of its
        links.
        """
        latencies: dict[Pair, list[float]] = {}
        rates: dict[Pair, list[float]] = {}
        for (worker, peer), (latency_s, bytes_per_s) in self._told.items():
            if worker in hosts and peer in hosts:
                between = pair(hosts[worker], hosts[peer])
                if latency_s is not None:
                    latencies.setdefault(between, []).append(latency_s)
                if bytes_per_s is not None:
                    rates.setdefault(between, []).append(bytes_per_s)
        return {
            between: LinkSpeed(latency_s=min(latencies.get(between, [site.link(*between).latency_s])), bytes_per_s=max(found))
            for between, found in rates.items()
        }
