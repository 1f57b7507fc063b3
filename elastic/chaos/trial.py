"""One run, from a schedule to its record: a real job, real faults, the evidence, and what the oracles say of it."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from elastic.chaos import gather, reference, script_check
from elastic.chaos.evidence import Evidence, Reference
from elastic.chaos.inject.disk import small_disk
from elastic.chaos.injector import Injector
from elastic.chaos.namespaces import Network
from elastic.chaos.oracles import FAIL, UNKNOWN, Finding, judge, verdict_of
from elastic.chaos.oracles.ending import usual_s
from elastic.chaos.own_etcd import OwnEtcd
from elastic.chaos.proxies import Proxies
from elastic.chaos.running import RunningJob
from elastic.chaos.sampler import Sampler
from elastic.chaos.scene import Scene
from elastic.chaos.schedule import Schedule
from elastic.errors import ElasticError, JobFailed

PATIENCE_S, _END_S = 120.0, 60.0
_SETTLE_S, _COMPLETE_S, _TRAINS_S, _LOOK_S = 2.0, 6.0, 2.0, 0.05
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A run that is over: the evidence, the findings, and the verdict of all of them."""

    evidence: Evidence
    findings: tuple[Finding, ...]
    harness_cpu_s: float

    @property
    def verdict(self) -> str:
        """FAIL, UNKNOWN or PASS."""
        return verdict_of(self.findings)

    @property
    def reasons(self) -> list[str]:
        """Why it is not a pass: `oracle: reason`, failures first."""
        order = {FAIL: 0, UNKNOWN: 1}
        found = sorted((each for each in self.findings if each.verdict in order), key=lambda each: order[each.verdict])
        return [f"{each.oracle}: {each.reason}" for each in found]


def run(
    schedule: Schedule,
    say: Say = lambda _: None,
    *,
    keep: Path | None = None,
    calm: Reference | None = None,
    patience_s: float = PATIENCE_S,
) -> Record:
    """Runs a schedule. With `keep` all files of the run are kept there. With `calm` numbers are compared with that undisturbed run.

    Raises SettingsError where the machine cannot have its faults, TrainFunctionError where workers could not import the script.
    """
    script_check.check(schedule.job)
    used = _cpu_s()
    folder = Path(tempfile.mkdtemp(prefix="elastic-chaos-")) if keep is None else keep
    folder.mkdir(parents=True, exist_ok=True)
    try:
        evidence = _evidence(schedule, folder, say, patience_s)
    finally:
        if keep is None:
            gather.remove(folder, folder / "disk" / "tmp")
    used = _cpu_s() - used
    evidence = _compared(evidence, say) if calm is None else replace(evidence, reference=calm)
    return Record(evidence=evidence, findings=judge(evidence), harness_cpu_s=used)


def _cpu_s() -> float:
    return time.process_time()


def _evidence(schedule: Schedule, folder: Path, say: Say, patience_s: float) -> Evidence:
    notices: list[str] = []
    with ExitStack() as stack:
        if any(each.kind == "disk-full" for each in schedule.injections):
            stack.enter_context(small_disk(folder / "disk"))
        network = stack.enter_context(_network(schedule, notices)) if schedule.job.hosts > 1 else None
        etcd = OwnEtcd(folder / "etcd", "127.0.0.1" if network is None else network.gateway) if schedule.own_etcd else None
        if etcd is not None:
            stack.callback(etcd.kill)
        for notice in notices:
            say(notice)
        job = RunningJob(schedule, folder, etcd, network)
        stack.callback(job.close)
        job.start()
        sampler = Sampler(job)
        stack.callback(sampler.close)
        injector = Injector(Scene(job, sampler), schedule.injections)
        stack.callback(injector.close)
        began = time.monotonic()
        stuck = _until_over(job, sampler, injector, say, patience_s)
        injector.close()
        sampler.close()
        return Evidence(
            schedule=schedule,
            effects=tuple(injector.effects),
            workers=gather.worker_notes(folder / "observed"),
            incidents=tuple(max(sampler.seen.incidents.values(), key=len, default=[])),
            seen=sampler.seen,
            hosts=gather.host_ends(job),
            left=gather.left_behind(job, etcd),
            began=sampler.first_at or began,
            ended=time.monotonic(),
            processors=os.cpu_count() or 1,
            last=job.last,
            stuck=stuck,
            history=gather.history(etcd),
            notices=tuple(notices),
        )


@contextmanager
def _network(schedule: Schedule, notices: list[str]) -> Iterator[Network | Proxies]:
    """A network for all hosts that the schedule may start: namespaces, or proxies where they or their delays are not permitted."""
    new = sum(each.kind in ("join", "drain", "host-loss") for each in schedule.injections)
    hosts = schedule.job.hosts + new
    made: Network | Proxies = Network(f"c{os.getpid() % 100000}x", hosts, f"10.{os.getpid() // 250 % 250}.{os.getpid() % 250}")
    try:
        made.make()
        if any(each.kind == "delay" for each in schedule.injections):
            made.delay(0, 1.0)
            made.delay(0, 0.0)
    except (OSError, subprocess.CalledProcessError) as error:
        made.remove()
        why = error.stderr.decode().strip() if isinstance(error, subprocess.CalledProcessError) else error
        notices.append(f"network namespaces with these faults are not possible here ({why}): TCP proxies take their place")
        made = Proxies(hosts)
        made.make()
    try:
        yield made
    finally:
        made.remove()


def _until_over(job: RunningJob, sampler: Sampler, injector: Injector, say: Say, patience_s: float) -> str | None:
    """Watches over the job until it is over; returns why it had to be ended, None if it ended."""
    told, settled_at = set[str](), None
    patience_s += sum(each.lasts_s for each in job.schedule.injections)
    ends_at: float | None = None
    while not (job.over and (job.ended or injector.done)):
        job.supervise()
        job.end_late()
        now = time.monotonic()
        if sampler.seen.broken is not None:
            return f"the harness failed: {sampler.seen.broken}"
        for line in _new_lines(injector, told):
            say(f"{now - (sampler.first_at or now):6.1f} s  step {sampler.step:5}  {line}")
        if now - sampler.moved_at > patience_s:
            return f"the job made no step for {patience_s:g} s, and the harness ended it in step {sampler.step}"
        if ends_at is None and _should_end(job, sampler, injector, now):
            settled_at = settled_at or now
            if _settled(job, sampler, now - settled_at):
                ends_at = now
                job.end_soon(sampler.highest, _step_s(sampler))
        time.sleep(_LOOK_S)
    return None


def _new_lines(injector: Injector, told: set[str]) -> list[str]:
    """What has not been said of faults: that they are injected, that they missed their moments, and why they had no effect."""
    found = []
    for number, effect in enumerate(injector.effects):
        lines = [f"{effect.injection}"] if effect.at is not None else []
        lines += [f"{effect.injection} again: {missed}" for missed in [*effect.missed]]
        lines += [f"{effect.injection} without effect: {effect.why}"] if effect.until is not None and effect.why is not None else []
        keys = {f"{number} {line}": line for line in lines}
        found += [line for key, line in keys.items() if key not in told]
        told.update(keys)
    return found


def _should_end(job: RunningJob, sampler: Sampler, injector: Injector, now: float) -> bool:
    """Whether it is time to let the job end: its time is over, and so are its faults."""
    if job.last is not None or sampler.first_at is None or not injector.done:
        return False
    trains = sampler.step >= 0 and now - sampler.moved_at < _TRAINS_S
    return trains and now - sampler.first_at >= 60 * job.schedule.job.minutes


def _settled(job: RunningJob, sampler: Sampler, seconds: float) -> bool:
    """Whether the job has trained on long enough for its end: until it has as many members as ever, or for some seconds more."""
    most = max((len(workers) for *_, workers in sampler.seen.views), default=0)
    return seconds >= _COMPLETE_S or (seconds >= _SETTLE_S and len(job.targets()) >= most)


def _step_s(sampler: Sampler) -> float:
    return (time.monotonic() - (sampler.first_at or 0.0)) / max(1, sampler.highest)


def _compared(evidence: Evidence, say: Say) -> Evidence:
    """The evidence with the undisturbed run. If losses differ, that is made again: a script that is not repeatable proves nothing."""
    if not evidence.steps:
        return replace(evidence, no_reference="no loop was given a step")
    steps = 1 + max(evidence.steps)
    digests = [step for notes in evidence.workers for step in notes.digests]
    by_itself = evidence.last is None or steps < evidence.last
    try:
        known = reference.reference(evidence.schedule.job, max([steps, *digests]), say, further=by_itself)
        evidence = replace(evidence, reference=known)
        if any(finding.verdict == FAIL and finding.oracle in ("losses", "digest") for finding in judge(evidence)):
            say("numbers differ: the undisturbed run is made again, to see whether the script is repeatable")
            evidence = replace(evidence, reference=reference.made_again(evidence.schedule.job, max([steps, *digests]), known))
    except (JobFailed, ElasticError, subprocess.TimeoutExpired) as error:
        evidence = replace(evidence, no_reference=str(error))
    return evidence


def summary(record: Record) -> str:
    """One line on a run."""
    evidence = record.evidence
    usual = usual_s(evidence) if len(evidence.steps) > 1 else 0.0
    faults = sum(effect.proof is not None for effect in evidence.effects)
    return f"{record.verdict}: {len(evidence.steps)} steps of {1000 * usual:.0f} ms, {faults} faults, {len(evidence.incidents)} incidents"


__all__ = ["FAIL", "PATIENCE_S", "UNKNOWN", "Record", "Reference", "run", "summary"]
