"""Evidence of a run in which all went well, to be spoiled by tests of oracles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from elastic.chaos.evidence import Evidence, Given, HostEnd, Left, Reference, WorkerNotes
from elastic.chaos.injection import parse
from elastic.chaos.sampler import Seen, Use
from elastic.chaos.scene import Effect, Hit
from elastic.chaos.schedule import JobSpec, Schedule

STEPS, SAMPLES, BATCH, PARTS = 20, 8, 4, 2


def given(worker: int, step: int, **changes: Any) -> Given:
    """A step of a job in which worker 1 died in step 8."""
    epoch = 1 if step < 8 else 2
    layout = "[0-2]x1 [3-5]x1" if epoch == 1 else "[0-5]x1"
    more = {"loss": 3.0 - step / 10, "grad_norm": 1.0 + step, "epoch": epoch, "workers": 3 - epoch, "layout": layout, "leader": worker == 0}
    return Given(**{"worker": worker, "pid": 100 + worker, "at": 50.0 + step / 10 + (step >= 8) * 0.5, "step": step, **more, **changes})


def taken(step: int, part: int) -> tuple[int, ...]:
    """The samples of a micro-batch: in order, again and again."""
    size = BATCH // PARTS
    first = step * BATCH + part * size
    return tuple((first + index) % SAMPLES for index in range(size))


def notes(worker: int, steps: range, **changes: Any) -> WorkerNotes:
    about = {"run": "a", "began": 40.0 + worker, "exact": True, "batch_size": BATCH, "micro_batch_size": BATCH // PARTS, "samples": SAMPLES}
    loads = tuple((step, part, taken(step, part)) for step in steps for part in range(PARTS))
    found = {**about, "given": tuple(given(worker, step) for step in steps), "loads": loads, "digests": {}, "returned": True, **changes}
    return WorkerNotes(worker=worker, pid=100 + worker, **found)


def incident(**changes: Any) -> dict[str, Any]:
    values = {"kind": "death", "epoch": 2, "worker": 1, "also": [], "why": None, "step": 8, "samples_lost": 0, "layout_after": "[0-5]x1"}
    return {**values, "at": None, "bytes_moved": 10, "bytes_minimum": 10, "went_back_to": None, **changes}


def uses(pid: int, **later: int) -> list[Use]:
    """What a process used before the fault, and at the end."""
    common: dict[str, Any] = {"pid": pid, "role": "agent", "members": 2, "threads": 5, "descriptors": 30, "cpu_s": 1.0}
    return [Use(at=50.2, **common), Use(at=60.0, **{**common, **later})]


def fine(**changes: Any) -> Evidence:
    """A run that passes, with changes."""
    kill = parse("kill@8 place=1")
    effect = Effect(kill, at=50.8, until=50.9, hits=[Hit(pid=101, worker=1, host=0, epoch=1, step=8)], proof="it died", why=None)
    workers = (notes(0, range(STEPS), digests={STEPS: "d"}), notes(1, range(8), returned=False))
    reference = Reference(
        losses=tuple(given(0, step).loss for step in range(STEPS)),
        grad_norms=tuple(given(0, step).grad_norm for step in range(STEPS)),
        digests={STEPS: "d"},
        whole=True,
    )
    views = [(49.0, 0, 1, (0, 1)), (51.0, 0, 2, (0,))]
    seen = Seen(views=views, uses=uses(7), machine=[(49.0, 0.0), (61.0, 1.0)], looks=100, read=200)
    evidence = Evidence(
        schedule=Schedule(job=JobSpec(workers=2, steps=STEPS), injections=(kill,)),
        effects=(effect,),
        workers=workers,
        incidents=(incident(),),
        seen=seen,
        hosts=(HostEnd(number=0, codes=(0,), log="elastic: worker 1 died"),),
        left=Left(),
        began=50.0,
        ended=60.0,
        last=STEPS,
        history=(
            ("/elastic/a/view", '{"epoch": 1, "attempt": 0, "digest": "x"}'),
            ("/elastic/a/view", '{"epoch": 2, "attempt": 0, "digest": "y"}'),
        ),
        reference=reference,
    )
    return replace(evidence, **changes)
