"""What workers tell of their links, by pair of hosts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from elastic.plan.site import LinkSpeed, Pair, Site, pair


class LinkFigures:
    """The newest figures of each link between two workers."""

    def __init__(self) -> None:
        self._told: dict[tuple[int, int], tuple[float | None, float | None]] = {}

    def note(self, worker: int, rows: Iterable[Sequence[float | None]]) -> None:
        """What a worker has observed: `[peer, latency_s, bytes_per_s]`, None where it does not know."""
        for peer, latency_s, bytes_per_s in rows:
            if peer is not None:
                self._told[worker, int(peer)] = latency_s, bytes_per_s

    def keep(self, workers: Iterable[int]) -> None:
        """Forgets the links of whoever is not one of these any more."""
        kept = set(workers)
        self._told = {link: told for link, told in self._told.items() if kept.issuperset(link)}

    def links(self, hosts: Mapping[int, str], site: Site) -> dict[Pair, LinkSpeed]:
        """Of each pair of hosts between which large messages have passed; `hosts` are the members'.

        Every rate is one that a link did reach, and every latency one that it kept below: so the best of a pair's links are the pair's.
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
