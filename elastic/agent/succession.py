"""Decides whether an agent that finds no coordinator may become it. Pure."""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elastic.membership.session import Standing

NOBODY_S = 60.0  # after which a host that knows nothing of the job gives it up
_BACK_S = 20.0  # after which a job that etcd does not know has ended: until then a host that knows it may write it again


class Succession(Enum):
    LEAD = auto()
    WAIT = auto()
    REJOIN = auto()  # the job has not been founded
    ENDED = auto()
    LOST = auto()  # the job has not ended, and no host that knows it is reached


def succession(standing: Standing, *, knows: bool, took_part: bool, searched_s: float) -> Succession:
    """Returns what to do where `standing` has no leader.

    `knows`: this agent knows the job; `took_part`: an agent of this host has trained in it. It has searched for the coordinator for
    `searched_s`, in which etcd has answered. If etcd has lost the job's data, an agent that knows the job leads it; others wait for one.
    """
    if not standing.settled:  # the coordinator may live, and be about to write its keys again
        return Succession.WAIT
    if standing.outcome is not None:
        return Succession.ENDED
    if knows:
        return Succession.LEAD if standing.named or standing.forgotten else Succession.ENDED
    if not standing.named and not took_part:
        return Succession.REJOIN
    if standing.mark is None and not took_part:
        return Succession.LEAD  # there is nothing to know yet
    if standing.mark is None:
        return Succession.WAIT if searched_s <= _BACK_S else Succession.ENDED
    return Succession.WAIT if searched_s <= NOBODY_S else Succession.LOST
