"""Tells failures apart that do not announce themselves, from repeated observations of a job's workers. Pure: evidence and time go in.

Each worker is in one of these conditions. Only a root of the wait-for graph can be blamed, except for one whose process is stopped.

    stopped        the process is stopped, and not all are
    hung           it sleeps: in a step, in its data loader, in the code of train_fn, at a checkpoint, in a recovery
    spinning       it computes, far longer than it ever took for this phase
    out of processor time      it wants to run and does not get a processor; never excluded
    slow           it computes for long, and nothing is known with which this could be compared; only reported
    waiting        for another worker; never blamed

Time counts only while workers are observed: not while all are stopped, nor while the observer itself stands still. Each exclusion doubles
the limits for a while, so that a cause outside the workers does not exclude one after the other.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from elastic.health import verdict as words
from elastic.health.evidence import Observed
from elastic.health.limits import USER_TIMES, Limits, allowance
from elastic.health.stay import Stay
from elastic.health.verdict import Verdict
from elastic.health.waiting import awaited, believed
from elastic.observe.activity import NOBODY, RECOVERY_PHASES, TRAIN_FN

LOOK_S = 0.2
"""How often workers are observed."""

TOLD_S = 2.0
"""How long a process may be stopped before it is reported, if it is not replaced."""

SLOW_S = 10.0
"""How long a worker may compute in one phase, or want to, before it is reported."""

FORGIVEN_S = 600.0
"""How long an exclusion for a hang lengthens the limits of later ones."""

_AWAITED_S = 0.3
_MOST_CREDIT = 2.0  # times LOOK_S
_PAUSE_S = 1.0  # a longer time between observations is the observer's own pause


class Judge:
    """Judges the workers of one job. `look` is to be called every LOOK_S seconds or so."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._stays: dict[int, Stay] = {}
        self._everybody_stopped = False
        self._excluded: list[float] = []  # when workers were excluded for a hang
        self._said: set[tuple[int, str, str]] = set()

    def look(
        self,
        seen: Sequence[Observed],
        now: float,
        *,
        asked: Collection[int] = (),
        starting: Collection[int] = (),
        spares: Collection[int] = (),
    ) -> list[Verdict]:
        """Returns the new findings at the time `now`, each once: those that exclude a worker, and those that are only to be reported.

        `asked` are workers whose answers the agent lacks; nobody waits for those that are `starting`, but they must not take for ever.
        Of `spares` only stopped ones are found.
        """
        others = [each for each in seen if each.worker not in spares] or seen
        everybody = bool(seen) and all(each.stopped for each in others)
        counts = not (everybody or self._everybody_stopped)
        self._everybody_stopped = everybody
        seen = believed(seen)
        waiting = awaited(seen, asked)
        stays = {each.worker: self._stays.get(each.worker, Stay()) for each in seen}
        self._stays = {
            each.worker: stays[each.worker].after(
                each, _credit(each, stays[each.worker]) if counts else 0.0, awaited=each.worker in waiting or each.worker in starting
            )
            for each in seen
        }
        if everybody:
            return []
        silent = self._silent(seen, now)
        found = [self._judged(each, waiting.get(each.worker, ()), silent, now) for each in seen]
        new = [each for each, observed in zip(found, seen, strict=True) if each is not None and self._is_new(each, observed)]
        present = {each.worker: each.moment for each in seen}
        self._said = {said for said in self._said if present.get(said[0]) == said[2]}
        self._excluded += [now for each in new if each.excludes and each.kind != words.STOPPED]
        return new

    def _is_new(self, found: Verdict, seen: Observed) -> bool:
        said = (found.worker, f"{found.kind} {found.excludes}", seen.moment)
        if said in self._said:
            return False
        self._said.add(said)
        return True

    def _silent(self, seen: Sequence[Observed], now: float) -> dict[int, float]:
        """Returns the workers that make no progress, with the seconds after which they are excluded.

        If there are several, they may be in a collective of the user's own, which the runtime does not see: all but one may be waiting for
        that one. So all get the longest of their limits, and only one is excluded: one that is where few others are.
        """
        hung_s = self._limits.hung_s
        if hung_s is None:
            return {}
        found: dict[int, float] = {}
        spots: dict[int, tuple[object, ...]] = {}
        for each in seen:
            stay, longer = self._stays[each.worker], self._longer(now)
            if not each.stopped and each.waits_for == NOBODY and stay.awaited_s >= _AWAITED_S and stay.idle_s >= hung_s * longer:
                found[each.worker] = allowance(each, hung_s).idle_s * longer
                spots[each.worker] = each.spot
        if len(found) < 2:
            return found
        there = Counter(spots.values())
        chosen = min(found, key=lambda worker: (there[spots[worker]], -self._stays[worker].still_s, worker))
        return {chosen: max(found.values())}

    def _judged(self, seen: Observed, waiting: Sequence[int], silent: Mapping[int, float], now: float) -> Verdict | None:
        stay, limits = self._stays[seen.worker], self._limits
        if seen.stopped:
            excludes = limits.stopped_s is not None and stay.stopped_s >= limits.stopped_s
            if excludes or stay.stopped_s >= TOLD_S:
                return _verdict(seen, words.STOPPED, words.stopped(seen, stay, waiting), stay.stopped_s, excludes=excludes)
            return None
        if stay.awaited_s < _AWAITED_S or seen.waits_for != NOBODY:
            return None
        if stay.idle_s >= silent.get(seen.worker, math.inf):
            return _verdict(seen, words.hung_kind(seen), words.idle(seen, stay, waiting), stay.still_s, excludes=True)
        if limits.hung_s is not None:
            allowed, longer = allowance(seen, limits.hung_s), self._longer(now)
            if stay.ran_s >= allowed.ran_s * longer and stay.still_s >= allowed.busy_s * longer:
                return _verdict(seen, words.SPINNING, words.busy(seen, stay, waiting), stay.still_s, excludes=True)
        return self._reported(seen, stay, waiting)

    def _reported(self, seen: Observed, stay: Stay, waiting: Sequence[int]) -> Verdict | None:
        """Returns what is only reported. Of the code of train_fn, workers report the line themselves."""
        if seen.doing is None or seen.standing is None or stay.still_s < SLOW_S:
            return None
        if seen.standing.place == TRAIN_FN and seen.doing.phase not in RECOVERY_PHASES:
            return None
        if stay.delayed_s > stay.still_s / 2 and stay.delayed_s > stay.ran_s:
            return _verdict(seen, words.STARVED, words.starved(seen, stay, waiting), stay.still_s, excludes=False)
        if stay.ran_s > stay.still_s / 2:
            return _verdict(seen, words.SLOW, words.busy(seen, stay, waiting), stay.still_s, excludes=False)
        if stay.idle_s > stay.still_s / 2:
            return _verdict(seen, words.SLOW, words.idle(seen, stay, waiting), stay.still_s, excludes=False)
        return None

    def _longer(self, now: float) -> float:
        """Returns the factor of the limits, from recent exclusions."""
        return min(USER_TIMES, 2.0 ** sum(now - at < FORGIVEN_S for at in self._excluded))


def _credit(seen: Observed, stay: Stay) -> float:
    """Returns the seconds since the last observation, by the clock of the worker's host; 0.0 if there is no new one."""
    passed = seen.seen_at - stay.seen_at
    return LOOK_S if passed > _PAUSE_S else min(max(0.0, passed), _MOST_CREDIT * LOOK_S)


def _verdict(seen: Observed, kind: str, why: str, for_s: float, *, excludes: bool) -> Verdict:
    return Verdict(worker=seen.worker, kind=kind, why=why, for_s=for_s, excludes=excludes, pid=seen.pid)
