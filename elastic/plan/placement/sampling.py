"""Which links to measure: one per pair of hosts and one within each, since workers of a host share its network; the rest follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from elastic.errors import PlanError
from elastic.plan.placement.pairing import Matrix


class Link(NamedTuple):
    """A measured link: seconds of latency, and bytes per second."""

    latency_s: float
    bytes_per_s: float


def representatives(hosts: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """The pairs of workers to measure, where worker i is on `hosts[i]`; hosts in the order of their first workers.

    One pair for every two hosts and one for every host of two workers or more. The workers of a host take turns, so that none of them
    takes part in all of its measurements.
    """
    members = _members(hosts)
    within = [(workers[0], workers[1]) for workers in members if len(workers) > 1]
    between = [
        (members[one][two % len(members[one])], members[two][one % len(members[two])]) for one, two in combinations(range(len(members)), 2)
    ]
    return (*within, *between)


def expanded(hosts: Sequence[str], measured: Mapping[tuple[int, int], Link]) -> tuple[Matrix, Matrix]:
    """Latencies in seconds and bandwidths in bytes per second, (workers, workers), from links that were measured.

    A pair of workers that was measured itself has its own link; any other has the mean over all that were measured between its two hosts.
    A link measured in one direction serves for both. The diagonal is 0 s at infinite bandwidth. Raises PlanError where nothing was
    measured between two hosts, or within one of several workers, and on pairs that are no two workers.
    """
    number = {host: i for i, host in enumerate(dict.fromkeys(hosts))}
    host = np.array([number[name] for name in hosts], dtype=np.intp)
    links = {**{(two, one): link for (one, two), link in measured.items()}, **measured}
    if strangers := [pair for pair in measured if not (0 <= min(pair) < max(pair) < len(hosts))]:
        raise PlanError(f"the measured pair {strangers[0]} is not of two of the {len(hosts)} workers")
    sums = np.zeros((3, len(number), len(number)))
    for (one, two), link in links.items():
        sums[:, host[one], host[two]] += (1, *link)
    counts = sums[0]
    alone = np.diag(np.bincount(host, minlength=len(number)) == 1)
    for one, two in np.argwhere((counts == 0) & ~alone)[:1]:
        names = list(number)
        raise PlanError(f"no link was measured from host {names[one]} to {names[two]}")
    latency, bandwidth = (total / np.maximum(counts, 1) for total in sums[1:])
    result = latency[np.ix_(host, host)], bandwidth[np.ix_(host, host)]
    for pair, link in links.items():
        result[0][pair], result[1][pair] = link
    np.fill_diagonal(result[0], 0)
    np.fill_diagonal(result[1], np.inf)
    return result


def _members(hosts: Sequence[str]) -> list[list[int]]:
    members: dict[str, list[int]] = {}
    for worker, host in enumerate(hosts):
        members.setdefault(host, []).append(worker)
    return list(members.values())
