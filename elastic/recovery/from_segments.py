"""Which transfers of a proposal come out of segments, and how: copied within a host, or sent by a member of a dead worker's host. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from elastic.layout.runs import missing
from elastic.layout.transfer import PARAM, Transfer
from elastic.recovery.inventory import Inventory
from elastic.view import Member, View

_IN_SEGMENTS = ("live", "previous", "gathered")  # a replica is not


def copied(
    moves: Sequence[Transfer], view: View, sources: Iterable[Inventory], resume: int, leaving: Sequence[Member] = ()
) -> tuple[int, ...]:
    """Returns the places of the transfers that are copied from a segment: all from dead workers, and those within a host.

    A live worker that computes on a device sends instead: its state lies there.
    """
    members = {member.worker: member for member in view.members}
    had: dict[tuple[int, int, bool], list[tuple[int, int]]] = {}  # the key ends with whether it is a parameter
    for inventory in sources:
        for copy in inventory.copies:
            if copy.step == resume and copy.role in _IN_SEGMENTS:
                for parameter in (True,) if copy.role == "gathered" else (True, False):
                    had.setdefault((inventory.worker, copy.layer, parameter), []).append((copy.start, copy.stop))
    found, leavers = [], {member.worker for member in leaving}
    for place, move in enumerate(moves):
        if move.source in leavers:
            continue
        source = members.get(move.source)
        if source is not None:
            if not source.segment or source.device != "cpu" or source.host != members[move.destination].host:
                continue
            if missing([(move.start, move.stop)], sorted(had.get((move.source, move.layer, move.state == PARAM), []))):
                continue
        found.append(place)
    return tuple(found)


def reachable(offers: Iterable[Inventory], members: Iterable[Member], hosts: Mapping[int, str]) -> list[Inventory]:
    """Returns the offers of dead workers on whose hosts there are members; `hosts` has the hosts of their workers; those without one
    are on the only host.
    """
    there = {member.host for member in members}
    return [offer for offer in offers if hosts.get(offer.worker) is None or hosts[offer.worker] in there]


def relay(
    moves: Sequence[Transfer], members: Sequence[Member], hosts: Mapping[int, str], leaving: Sequence[Member] = ()
) -> tuple[tuple[Transfer, ...], tuple[tuple[int, int], ...]]:
    """Replaces the sources of transfers from dead workers to other hosts by members of their hosts. Returns the transfers, and pairs of the
    place of such a transfer and the dead worker."""
    own = {member.worker: member.host for member in (*members, *leaving)}
    first = {member.host: member.worker for member in reversed(members)}
    found, relayed = list(moves), []
    for place, move in enumerate(moves):
        host = hosts.get(move.source)
        if move.source not in own and host is not None and host != own[move.destination]:
            found[place] = replace(move, source=first[host])
            relayed.append((place, move.source))
    return tuple(found), tuple(relayed)
