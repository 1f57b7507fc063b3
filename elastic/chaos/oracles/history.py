"""Oracles of the job's history: views, commits, incidents, and who was blamed."""

from __future__ import annotations

import json
import re
from itertools import pairwise

from elastic.chaos.evidence import Evidence
from elastic.chaos.oracles.finding import Finding, judged, unknown

_KILLS = ("kill", "kill-many", "kill-during-recovery")
_LAYERS = re.compile(r"\[(\d+)(?:-(\d+))?\]x(\d+)")


def one_history(evidence: Evidence) -> Finding:
    """Epochs only rise, each has one set of members and one layout, and etcd's view was only ever replaced by the next one."""
    wrong = [*_known_views(evidence), *_layouts(evidence), *_writes(evidence)]
    written = [key for key, value in evidence.history or () if key.endswith("/view") and value is not None]
    if not wrong and (not evidence.seen.views or (evidence.history is not None and not written)):
        return unknown("one history", "no view was seen" + (" in etcd's history" if evidence.seen.views else ""))
    how = (
        "as etcd's history, hosts' files and workers' reports say"
        if evidence.history is not None
        else "as hosts' files and workers' reports say"
    )
    return judged("one history", wrong, f"{len({(view[2], view[3]) for view in evidence.seen.views})} views in order, {how}")


def _known_views(evidence: Evidence) -> list[str]:
    wrong, runs = [], len(evidence.runs)
    for host in {view[1] for view in evidence.seen.views}:
        epochs = [view[2] for view in evidence.seen.views if view[1] == host]
        falls = [(one, other) for one, other in pairwise(epochs) if other < one]
        if len(falls) > max(0, runs - 1):
            wrong.append(f"host {host} knew epoch {falls[-1][1]} after epoch {falls[-1][0]}")
    if runs == 1:
        for epoch in sorted({view[2] for view in evidence.seen.views}):
            members = {view[3] for view in evidence.seen.views if view[2] == epoch}
            if len(members) > 1:
                wrong.append(f"epoch {epoch} has different members: {sorted(members)}")
    return wrong


def _layouts(evidence: Evidence) -> list[str]:
    wrong = []
    for run in evidence.runs:
        known: dict[int, tuple[str, int]] = {}
        for given in (each for notes in run for each in notes.given):
            layout = known.setdefault(given.epoch, (given.layout, given.workers))
            if layout != (given.layout, given.workers):
                wrong.append(f"epoch {given.epoch} has layouts {layout[0]} and {given.layout}")
        for notes in run:
            epochs = [given.epoch for given in notes.given]
            wrong += [f"worker {notes.worker} went from epoch {one} to {other}" for one, other in pairwise(epochs) if other < one]
    return wrong


def _writes(evidence: Evidence) -> list[str]:
    """What is wrong with the writes of views to etcd: the next one has a higher epoch, and two of an epoch are the same."""
    wrong, last = [], dict[str, tuple[int, str]]()
    for key, value in evidence.history or ():
        if not key.endswith("/view") or value is None:
            continue
        try:
            data = json.loads(value)
            epoch, digest = data["epoch"], data["digest"]
        except (ValueError, KeyError, TypeError):
            wrong.append(f"{key} was written as {value[:40]!r}")
            continue
        before = last.get(key)
        if before is not None and (epoch, digest) != before and epoch <= before[0]:
            wrong.append(f"etcd's view of epoch {before[0]} was replaced by one of epoch {epoch}")
        last[key] = epoch, digest
    return wrong


def promises(evidence: Evidence) -> Finding:
    """Nobody acts for an epoch after its inventory for the next."""
    if not evidence.seen.read and not evidence.seen.breaches:
        return unknown("promises", "no worker was seen to do anything")
    return judged("promises", evidence.seen.breaches, f"{evidence.seen.looks} looks at all workers saw nobody act after an inventory")


def accounts(evidence: Evidence) -> Finding:
    """Each incident that was recorded lost no sample, moved no less than the least, and ended in a layout that has each layer once."""
    wrong = [*evidence.seen.unreadable, *_unrecorded(evidence)]
    for each in evidence.incidents:
        about = f"the {each['kind']} at epoch {each['epoch']}"
        if each["samples_lost"]:
            wrong.append(f"{about} lost {each['samples_lost']} samples")
        if each["layout_after"] and not _covers(each["layout_after"]):
            wrong.append(f"{about} ended in {each['layout_after']}, which has not each layer once")
        moved, least = each["bytes_moved"], each["bytes_minimum"]
        if moved is not None and least is not None and moved < least:
            wrong.append(f"{about} moved {moved} bytes, and needs at least {least}")
    for host in evidence.hosts:
        if "this is a bug" in host.log or "the agent failed" in host.log:
            at = next(line for line in host.log.splitlines() if "this is a bug" in line or "the agent failed" in line)
            wrong.append(f"host {host.number} said: {at[:200]}")
    return judged("accounts", wrong, f"{len(evidence.incidents)} incidents add up")


def _unrecorded(evidence: Evidence) -> list[str]:
    """Workers that a fault killed, in a job that went on in a later view, and that no incident has. A full disk may have no room for it."""
    if len(evidence.runs) != 1 or any(effect.injection.kind == "disk-full" for effect in evidence.effects):
        return []
    lost = {worker for each in evidence.incidents for worker in (each["worker"], *each["also"])}
    newest = max((given.epoch for notes in evidence.workers for given in notes.given), default=0)
    kills = [effect for effect in evidence.effects if effect.injection.kind in _KILLS and effect.proof is not None]
    hits = [hit for effect in kills for hit in effect.hits if hit.worker is not None and hit.epoch is not None and hit.epoch < newest]
    return [f"worker {hit.worker} was killed in epoch {hit.epoch}, and no incident has it" for hit in hits if hit.worker not in lost]


def _covers(layout: str) -> bool:
    expected = 0
    for first, last, workers in _LAYERS.findall(layout):
        if int(first) != expected or int(workers) < 1:
            return False
        expected = int(last or first) + 1
    return expected > 0


def blame(evidence: Evidence) -> Finding:
    """Whoever was lost, evicted or found damaged was hit by a fault."""
    if len(evidence.runs) > 1:
        return (
            unknown("blame", "the job was started again: numbers of workers stand for several workers")
            if _strange(evidence)
            else _all_hit(evidence)
        )
    return judged("blame", _strange(evidence), f"all {len(evidence.incidents)} incidents have a fault as their cause")


def _all_hit(evidence: Evidence) -> Finding:
    return judged("blame", [], f"all {len(evidence.incidents)} incidents have a fault as their cause")


def _strange(evidence: Evidence) -> list[str]:
    hit = {worker for effect in evidence.effects for worker in effect.workers}
    hosts = any(
        effect.injection.of.hosts > 1 or effect.injection.kind == "agent-kill" for effect in evidence.effects if effect.at is not None
    )
    wrong = []
    for each in evidence.incidents:
        if each["kind"] not in ("death", "eviction", "damage"):
            continue
        lost = {each["worker"], *each["also"]} - {None}
        with_host = hosts and each["why"] is not None and "host" in each["why"]
        if each["kind"] == "damage" and not any(effect.injection.kind == "corrupt" for effect in evidence.effects):
            wrong.append(f"copies of the state were damaged or differed, and no fault touched them: {each['why']}")
        elif lost - hit and not with_host:
            wrong.append(f"{each['kind']} of workers {sorted(lost - hit)}, whom no fault hit: {each['why']}")
    return wrong
