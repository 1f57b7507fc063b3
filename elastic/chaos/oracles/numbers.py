"""Oracles of what was computed: losses, parameters, samples, and steps, each once."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

from elastic.chaos.evidence import Evidence, Given, Reference, WorkerNotes
from elastic.chaos.oracles.finding import Finding, failed, judged, passed, unknown

TOLERANCE = 1e-3
"""The relative difference that a script with `exact=False` may show."""


def losses(evidence: Evidence) -> Finding:
    """Every loss and gradient norm is that of the undisturbed run; within a tolerance if the script is not exact."""
    name, known, steps = "losses", evidence.reference, evidence.steps
    if known is None:
        return unknown(name, f"there is no undisturbed run to compare with: {evidence.no_reference}")
    if not steps:
        return unknown(name, "no step was given to any loop")
    different = [step for step, given in steps.items() if step not in evidence.disclaimed and not _same(given, known)]
    if not different:
        back = (
            f"; steps {sorted(evidence.disclaimed)} are left out, since the job said that they may be wrong" if evidence.disclaimed else ""
        )
        how = "bit for bit" if _exact(evidence, known) else f"within {TOLERANCE:g}, since the script has exact=False"
        return passed(name, f"{len(steps)} losses and gradient norms are those of the undisturbed run, {how}{back}")
    if not known.repeatable:
        return unknown(name, _UNREPEATABLE)
    if different[0] >= len(known.losses) and not known.whole:
        return unknown(name, f"the undisturbed run has only {len(known.losses)} steps, and {len(steps)} were given")
    step = different[0]
    loss = known.losses[step] if step < len(known.losses) else None
    return failed(
        name,
        f"step {step} has loss {steps[step].loss!r}, undisturbed {loss!r} (gradient norm {steps[step].grad_norm!r}); "
        f"{len(different)} of {len(steps)} steps differ. Just before: {_just_before(evidence, steps[step].at)}",
    )


_UNREPEATABLE = "the script is not repeatable: two undisturbed runs differ. Give it a seed (torch.manual_seed, Trainer(seed=))"


def _just_before(evidence: Evidence, at: float) -> str:
    faults = [effect for effect in evidence.effects if effect.at is not None and effect.at <= at]
    return str(max(faults, key=lambda effect: effect.at or 0.0).injection) if faults else "no fault"


def _exact(evidence: Evidence, known: Reference) -> bool:
    return known.exact and all(notes.exact for notes in evidence.workers)


def _same(given: Given, known: Reference) -> bool:
    if given.step >= len(known.losses):
        return False
    numbers = known.losses[given.step], known.grad_norms[given.step]
    return _alike((given.loss, given.grad_norm), numbers, exact=known.exact)


def _alike(some: tuple[float, ...], others: tuple[float, ...], *, exact: bool) -> bool:
    """Whether numbers are the same, or within the tolerance if they need not be exact. What is no number is alike."""
    tolerance = 0.0 if exact else TOLERANCE
    return all(
        math.isclose(one, other, rel_tol=tolerance) or (math.isnan(one) and math.isnan(other))
        for one, other in zip(some, others, strict=True)
    )


def digest(evidence: Evidence) -> Finding:
    """The parameters after the last step are those of the undisturbed run."""
    name, known = "digest", evidence.reference
    found = {step: value for notes in evidence.runs[-1] for step, value in notes.digests.items()} if evidence.runs else {}
    if not found:
        return unknown(name, "the job ended without a digest of its parameters")
    if known is None:
        return unknown(name, f"there is no undisturbed run to compare with: {evidence.no_reference}")
    if not _exact(evidence, known):
        return passed(name, "the script has exact=False: parameters may differ in their last bits, and losses are compared instead")
    step = max(found)
    if known.digests.get(step) == found[step]:
        return passed(name, f"all parameters after {step} steps are those of the undisturbed run, bit for bit")
    if not known.repeatable:
        return unknown(name, _UNREPEATABLE)
    if step not in known.digests:
        return unknown(name, f"the undisturbed run has no digest after {step} steps")
    return failed(name, f"the parameters after {step} steps differ from those of the undisturbed run")


def handed_once(evidence: Evidence) -> Finding:
    """Each loop is given each step once, in order; a job that is started again goes on from its checkpoint."""
    wrong = []
    for notes in evidence.workers:
        steps = [given.step for given in notes.given]
        if steps != list(range(steps[0], steps[0] + len(steps)) if steps else []):
            at = next(one for one, other in pairwise(steps) if other != one + 1)
            wrong.append(f"worker {notes.worker} was given step {steps[steps.index(at) + 1]} after step {at}")
    reached = -1
    for run in evidence.runs:
        steps = sorted({given.step for notes in run for given in notes.given})
        every = run[0].every or evidence.schedule.job.checkpoint_every
        if not steps:
            continue
        wrong += [*_ends(evidence, steps, reached, every), *_apart(run)]
        reached = steps[-1]
    early, sure = _early(evidence, reached + 1)
    if early and not (sure or wrong):
        return unknown("handed out once", early)
    wrong += [early] if early else []
    return judged("handed out once", wrong, f"{reached + 1} steps, each given once to each loop, in {len(evidence.runs)} run(s) of the job")


def _apart(run: list[WorkerNotes]) -> list[str]:
    """Loops of a run that began later in a view than all others of that view, or that ended with another step."""
    wrong, given = [], [notes for notes in run if notes.given]
    for notes in given:
        begin = notes.given[0]
        others = [first for each in given if each is not notes and (first := _first(each, begin.epoch)) is not None]
        if others and begin.step > max(others):
            wrong.append(f"worker {notes.worker} was given step {begin.step} first, and all others of that view step {max(others)}")
    ends = sorted({notes.given[-1].step for notes in given if notes.returned})
    if len(ends) > 1:
        wrong.append(f"loops that ended by themselves were given steps up to {', '.join(map(str, ends))}")
    return wrong


def _first(notes: WorkerNotes, epoch: int) -> int | None:
    """The first step of this view that a loop was given."""
    return next((given.step for given in notes.given if given.epoch == epoch), None)


def _early(evidence: Evidence, steps: int) -> tuple[str, bool]:
    """A sentence if the training ended before its time, and whether that is sure; an empty one if the script was to end there."""
    known = evidence.reference
    if known is None or not steps or (evidence.last is not None and steps >= evidence.last):
        return "", True
    if len(known.losses) > steps:
        return f"loops ended after {steps} steps, and the undisturbed run goes on", _exact(evidence, known)
    if not known.whole or len(known.losses) < steps:
        return f"loops ended after {steps} steps by themselves, and nothing shows that the undisturbed run does", False
    return "", True


def _ends(evidence: Evidence, steps: list[int], reached: int, every: int) -> list[str]:
    """What is wrong with the steps of one run of the job, behind one that had `reached` a step; it saves every so many steps."""
    wrong = [] if steps == list(range(steps[0], steps[-1] + 1)) else [f"steps are missing between {steps[0]} and {steps[-1]}"]
    if steps[0] > reached + 1:
        wrong.append(f"the job went on with step {steps[0]} after step {reached}")
    elif every and steps[0] % every and steps[0] != reached + 1 and evidence.last != steps[0]:
        wrong.append(f"the job was started again at step {steps[0]}, and saves every {every} steps")
    elif not every and reached >= 0 and steps[0] and steps[0] != reached + 1:
        wrong.append(f"the job was started again at step {steps[0]} without a checkpoint")
    return wrong


def samples(evidence: Evidence) -> Finding:
    """Every micro-batch of every step was loaded, always of the same samples, and each sample is used once in each epoch of the data."""
    name = "samples"
    steps = evidence.steps
    if not steps or not evidence.workers:
        return unknown(name, "no step was given to any loop")
    first = evidence.workers[0]
    loaded: dict[tuple[int, int], set[tuple[int, ...] | None]] = {}
    for notes in evidence.workers:
        for step, micro_batch, taken in notes.loads:
            loaded.setdefault((step, micro_batch), set()).add(taken)
    parts = first.batch_size // first.micro_batch_size
    wrong = [
        f"micro-batch {part} of step {step} was loaded by nobody" for step in steps for part in range(parts) if (step, part) not in loaded
    ]
    wrong += [
        f"micro-batch {part} of step {step} had different samples" for (step, part), taken in sorted(loaded.items()) if len(taken) > 1
    ]
    if not wrong and first.samples is not None and 0 in steps:
        wrong = _balanced(loaded, max(steps) + 1, parts, first)
    how = (
        "of a function of step and micro-batch"
        if first.samples is None
        else f"each of {first.samples} samples once in each epoch of the data"
    )
    return judged(name, wrong, f"{len(steps) * first.batch_size} samples, {how}")


def _balanced(loaded: dict[tuple[int, int], set[tuple[int, ...] | None]], steps: int, parts: int, about: WorkerNotes) -> list[str]:
    """What is wrong with how often samples are used: after each step, all samples are used equally often, or once more."""
    count, used = about.samples or 1, Counter[int]()
    often = Counter({0: count})  # how many samples were used so often
    for step in range(steps):
        for index in (index for part in range(parts) for taken in loaded.get((step, part), ()) for index in taken or ()):
            often.subtract([used[index]])
            used[index] += 1
            often.update([used[index]])
        done, rest = divmod((step + 1) * about.batch_size, count)
        if +often != +Counter({done: count - rest, done + 1: rest}):
            most, times = used.most_common(1)[0]
            least = min(range(count), key=lambda index: used[index])
            return [f"after step {step}, sample {most} was used {times} times and sample {least} {used[least]} times"]
    return []


def agreement(evidence: Evidence) -> Finding:
    """All workers were given the same numbers for a step: no step was committed in two ways."""
    known: dict[int, tuple[str, Given]] = {}
    wrong, exact = [], all(notes.exact for notes in evidence.workers)
    for run, given in ((notes.run, each) for notes in evidence.workers for each in notes.given):
        first, other = known.setdefault(given.step, (run, given))
        same = _alike((given.loss, given.grad_norm), (other.loss, other.grad_norm), exact=exact or run == first)
        if not same and given.step not in evidence.disclaimed:
            wrong.append(
                f"step {given.step}: worker {other.worker} was given loss {other.loss!r}, and worker {given.worker} {given.loss!r}"
            )
    return judged("agreement", wrong, f"all workers agree on {len(known)} steps")
