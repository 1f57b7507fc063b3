"""Oracles of how faults took effect, how the job ended, what it left, and how long it stood still."""

from __future__ import annotations

import statistics
from itertools import pairwise

from elastic.chaos.evidence import Evidence
from elastic.chaos.kinds import END_A_HOST
from elastic.chaos.oracles.finding import Finding, failed, judged, passed, unknown
from elastic.chaos.sampler import Use
from elastic.chaos.scene import Effect

RECOVERY_S, UNASKED_S, AGAIN_S = 2.5, 2.0, 100.0
"""What a recovery may take beyond the time until it is noticed; a stall without a fault; a job that is started again."""

_STEPS, _CROWDED, _SILENT_S, _STUCK_S = 5, 0.35, 4.0, 30.0
_THREADS, _DESCRIPTORS, _LEAKS, _IDLE = 3, 12, 5, 0.5
_TAKEN_OVER_S = 5.0  # until another agent coordinates a job that has lost the one that did


def took_effect(evidence: Evidence) -> Finding:
    """Every fault of the schedule proved that it took effect. Random ones that were due after the script's own end are left out."""
    name, without = "took effect", [effect for effect in evidence.effects if effect.proof is None]
    late = [effect for effect in without if effect.over]
    count, steps = len(evidence.effects) - len(late), 1 + max(evidence.steps, default=-1)
    tries = sum(len(effect.missed) for effect in evidence.effects)
    again = f", after {tries} that missed their moment" if tries else ""
    if without and not (evidence.schedule.drawn and len(late) == len(without) and count):
        reasons = [f"{effect.injection}: {effect.why}" for effect in without[:3]]
        advice = f" (the script ended by itself after {steps} steps: give earlier faults)" if late and evidence.last is None else ""
        more = f"; and {len(without) - 3} more" if len(without) > 3 else ""
        return unknown(name, "; ".join(reasons) + more + advice)
    left_out = f"; {len(late)} random ones are left out, since the job had ended after {steps} steps before they were due" if late else ""
    return passed(name, f"all {count} faults took effect{again}{left_out}")


def ended(evidence: Evidence) -> Finding:
    """The job ended by itself, well; it was started again only after it had lost what the schedule may cost it."""
    name = "ended"
    if evidence.seen.broken is not None:
        return unknown(name, f"the harness failed: {evidence.seen.broken}")
    if evidence.stuck is not None:
        crowded = others_share(evidence, evidence.ended - _STUCK_S, evidence.ended) > _CROWDED
        more = " while other programs took the processors of this machine" if crowded else ""
        said = f"{evidence.stuck}{more}. The log ends with: {_last_words(evidence)}"
        return unknown(name, said) if crowded else failed(name, said)
    bad = [host for host in evidence.hosts if host.codes and host.codes[-1] not in (0, 143) and not _was_killed(evidence, host.number)]
    if bad:
        return failed(name, f"host {bad[0].number} ended with exit code {bad[0].codes[-1]}: {_last_words(evidence, bad[0].number)}")
    if not evidence.runs:
        return unknown(name, "the job ended without an elastic.Trainer, so nothing was trained: the train function must make one")
    again = len(evidence.runs) - 1
    if again and not _all_lost(evidence):
        if _crowded_at_the_end_of_a_run(evidence):
            return unknown(
                name, f"the job was started again while other programs took the processors of this machine: {_last_words(evidence)}"
            )
        return failed(name, f"the job was started again {again} times, and no fault of the schedule ends a job: {_last_words(evidence)}")
    return passed(name, "the job ended well" + (f"; it was started again {again} time(s), and went on" if again else ""))


def _crowded_at_the_end_of_a_run(evidence: Evidence) -> bool:
    """Whether a run of the job that was not the last one ended while other programs took the machine: then hosts seem to be silent."""
    ends = [max((given.at for notes in run for given in notes.given), default=evidence.began) for run in evidence.runs[:-1]]
    return any(others_share(evidence, end, end + _SILENT_S) > _CROWDED for end in ends)


def _was_killed(evidence: Evidence, number: int) -> bool:
    return any(hit.host == number for effect in evidence.effects if effect.injection.kind == "host-loss" for hit in effect.hits)


def _all_lost(evidence: Evidence) -> bool:
    """Whether the schedule took the last host with members, and so all copies of the state."""
    return any(effect.at is not None and effect.others == 0 for effect in evidence.effects)


def _last_words(evidence: Evidence, number: int | None = None) -> str:
    logs = [host.log for host in evidence.hosts if number in (None, host.number)]
    lines = [line.strip() for line in "\n".join(logs).splitlines() if "warning: etcd" not in line]
    return " | ".join(lines[-6:])[-900:]


def left_behind(evidence: Evidence) -> Finding:
    """No process, file, key or lease of the job is left."""
    left = evidence.left
    if evidence.stuck is not None:
        return unknown("left behind", "the harness ended the job")
    keys = (
        left.keys if len(evidence.runs) == 1 and not _all_lost(evidence) else ()
    )  # a job that was killed leaves keys with leases of an hour
    wrong = [f"a process is left: {each}" for each in left.processes] + [f"a file is left: {each}" for each in left.files]
    wrong += [f"a key is left in etcd: {each}" for each in keys]
    if left.leases and not left.keys and len(evidence.runs) == 1 and not _all_lost(evidence):
        wrong.append(f"{left.leases} leases are left in etcd")
    if not wrong and left.unread:
        return unknown("left behind", f"etcd does not say what is left in it: {left.unread}")
    return judged("left behind", wrong, "no process, file or key is left")


def resources(evidence: Evidence) -> Finding:
    """Survivors' threads, descriptors and, of agents, idle processor time are what they were before the first fault.

    What they had before the job's first step does not count: they were still connecting.
    """
    name, wrong, compared = "resources", list[str](), 0
    begun = min((given.at for notes in evidence.workers for given in notes.given), default=float("inf"))
    by: dict[int, list[Use]] = {}
    for use in evidence.seen.uses:
        by.setdefault(use.pid, []).append(use)
    for uses in by.values():
        before = [use for use in uses if begun <= use.at < evidence.first_fault_at]
        before = [use for use in before if use.watched == before[-1].watched]
        after = _settled(evidence, uses, before)
        if after:
            compared += 1
            wrong += _grown(evidence, uses, before, after)
    if not compared:
        return passed(name, "no process lived from before the first fault to the end with as many members")
    return judged(name, wrong, f"{compared} survivors have the threads and descriptors that they had")


def _grown(evidence: Evidence, uses: list[Use], before: list[Use], after: list[Use]) -> list[str]:
    """What a process has more of than before the first fault. One more descriptor for each new view is a leak too, but for an agent that
    coordinates the job since a host was lost: it has the links of the one before."""
    one, other, wrong = max(before, key=lambda use: use.descriptors), after[len(after) // 2], list[str]()
    threads, descriptors, stale = (
        int(statistics.median(found)) for found in zip(*((use.threads, use.descriptors, use.stale) for use in after), strict=True)
    )
    if stale:
        wrong.append(f"the {one.role} has {stale} open files of processes that have ended")
    if threads > max(use.threads for use in before) + _THREADS:
        wrong.append(f"the {one.role} has {threads} threads, before the first fault {one.threads}")
    moved = _coordinates_since(evidence)
    first = (
        one
        if one.at > moved
        else next((use for use in uses if moved < use.at < other.at and (use.members, use.watched) == (one.members, one.watched)), other)
    )
    views = len({view[2] for view in evidence.seen.views if first.at < view[0] < other.at})
    if descriptors > one.descriptors + _DESCRIPTORS:
        wrong.append(f"the {one.role} has {descriptors} open descriptors, before the first fault {one.descriptors}")
    elif views >= _LEAKS and descriptors - first.descriptors >= views:
        wrong.append(f"the {one.role} has {descriptors} open descriptors, and had {first.descriptors} {views} views ago")
    if one.role == "agent" and min(before[-1].at - before[0].at, after[-1].at - after[0].at) > 0.5:
        idle, busy = ((uses[-1].cpu_s - uses[0].cpu_s) / (uses[-1].at - uses[0].at) for uses in (before, after))
        if busy > idle + _IDLE:
            wrong.append(f"the agent computes {busy:.2f} s in each second, before the first fault {idle:.2f} s")
    return wrong


def _coordinates_since(evidence: Evidence) -> float:
    """The time since which the agent that coordinates at the end may have done so: a job of several hosts changes hands if it loses one."""
    lost = [effect for effect in evidence.effects if effect.injection.kind in END_A_HOST and evidence.schedule.job.hosts > 1]
    return max((max(effect.at or 0.0, effect.until or 0.0) + _TAKEN_OVER_S for effect in lost), default=0.0)


def _settled(evidence: Evidence, uses: list[Use], before: list[Use]) -> list[Use]:
    """What a process used late enough behind the last fault, with as many members, and as many processes of its own, as before the first;
    before it ended, if known."""
    until = max((effect.until or 0.0 for effect in evidence.effects), default=0.0)
    ends = max((given.at for notes in evidence.workers for given in notes.given), default=0.0)
    alike = {(use.members, use.watched) for use in before[-1:]}
    found = [use for use in uses if use.at > until + 1.0 and (use.members, use.watched) in alike]
    return [use for use in found if use.at < ends] or found


def stalls(evidence: Evidence) -> Finding:
    """No time between two steps is longer than what the faults in it may cost."""
    found = gaps(evidence)
    if not found:
        return unknown("stalls", "fewer than two steps were given")
    worst, wrong, crowded = max(found, key=lambda gap: gap[1] - gap[0]), list[str](), list[str]()
    for begin, end, step in found:
        faults = near(evidence, begin, end)
        bound = allowed_s(evidence, faults)
        if end - begin > bound:
            names = ", ".join(str(each.injection) for each in faults) or "no fault"
            said = f"{end - begin:.2f} s before step {step}, at most {bound:.2f} s with {names}"
            (crowded if others_share(evidence, begin, end) > _CROWDED else wrong).append(said)
    if not wrong and crowded:
        return unknown("stalls", f"other programs took the processors of this machine: {crowded[0]}")
    return judged("stalls", wrong, f"the longest time between two steps is {worst[1] - worst[0]:.2f} s")


def gaps(evidence: Evidence) -> list[tuple[float, float, int]]:
    """The times between consecutive steps, as the first loop was given each: begin, end, and the later step."""
    first: dict[int, float] = {}
    for run in evidence.runs:
        for given in (each for notes in run for each in notes.given):
            first[given.step] = min(first.get(given.step, given.at), given.at)
    steps = sorted(first.items(), key=lambda pair: pair[1])
    return [(one[1], other[1], other[0]) for one, other in pairwise(steps)]


def usual_s(evidence: Evidence) -> float:
    """The median time between two steps."""
    return statistics.median(end - begin for begin, end, _ in gaps(evidence))


def near(evidence: Evidence, begin: float, end: float) -> list[Effect]:
    """The faults that may have to do with a time between two steps."""
    known = [effect for effect in evidence.effects if effect.at is not None]
    return [
        each
        for each in known
        if (each.at or 0.0) < end and max(each.until or 0.0, (each.at or 0.0) + each.injection.of.noticed_s) > begin - 1.0
    ]


def allowed_s(evidence: Evidence, faults: list[Effect]) -> float:
    """How long the job may stand still: the times until faults are noticed, a recovery for each, and some steps."""
    bound = UNASKED_S + _STEPS * usual_s(evidence)
    for effect in faults:
        bound += (1 + len(effect.missed)) * (effect.injection.of.noticed_s + RECOVERY_S)
        if effect.injection.kind.startswith("etcd-") or effect.injection.kind == "disk-full":
            bound += effect.injection.lasts_s + RECOVERY_S  # a recovery waits for it
        if effect.injection.kind in ("agent-kill", "host-loss", "partition") and (evidence.schedule.job.hosts == 1 or _all_lost(evidence)):
            bound += AGAIN_S
        if effect.injection.kind == "delay":
            bound += 50 * effect.injection.strength / 1000
    everyone = [effect for effect in faults if len(effect.workers) >= evidence.schedule.job.hosts * evidence.schedule.job.workers]
    killed = {worker for effect in faults for worker in effect.workers}
    if everyone or len(killed) >= evidence.schedule.job.hosts * evidence.schedule.job.workers:
        bound += AGAIN_S / 2  # new workers must be started before anything goes on
    return bound


def others_share(evidence: Evidence, begin: float, end: float) -> float:
    """The share of the machine that other programs took meanwhile."""
    machine = [each for each in evidence.seen.machine if begin - 1.5 <= each[0] <= end + 1.5]
    if len(machine) < 2:
        return 0.0
    busy, seconds = machine[-1][1] - machine[0][1], machine[-1][0] - machine[0][0]
    used = [cpu_s for at, cpu_s in evidence.seen.own if machine[0][0] <= at <= machine[-1][0]]
    own = sum(max(0.0, other - one) for one, other in pairwise(used))  # it falls when a process ends that nobody waits for
    return max(0.0, busy - own) / (seconds * evidence.processors) if seconds > 0 else 0.0
