"""Decides whether an input, or a lack of memory, caused deaths of workers, from the recorded losses alone. Pure.

A bad input kills every worker that computes it, and no other worker. So it is to blame if the same micro-batch in the same layers has
killed or hung three workers, each time through the process itself, and no other worker was lost while that step was tried. Deaths from
outside the process are never blamed on the input. A step in which workers have run out of memory each time that it was tried, does not
fit: trying it again would go on for ever.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from elastic.control.carrier import Death
from elastic.health.verdict import OWN
from elastic.observe.activity import STEP_PHASES
from elastic.view import View

DEATHS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchLoss:
    """The loss of a member of view `epoch` in `step`; `step` is None if the worker was between steps, or if the step is unknown.

    `micro_batch` is the one that it was computing in its `layers`, None if it was not computing. `own`: the process ended by itself, not
    from outside; `no_memory`: since no memory was left. `host` is where it ran; `elsewhere`: other workers ran on other hosts.
    """

    worker: int
    epoch: int
    step: int | None = None
    micro_batch: int | None = None
    layers: tuple[int, ...] = ()
    own: bool = False
    no_memory: bool = False
    host: str = ""
    elsewhere: bool = False


def blamed(losses: Sequence[MicroBatchLoss]) -> str | None:
    """Returns a sentence that blames the input for the last of these losses; None if the cause may be something else."""
    last = losses[-1]
    if last.step is None or last.micro_batch is None:
        return None
    same = [loss for loss in losses if (loss.step, loss.micro_batch, loss.own) == (last.step, last.micro_batch, True)]
    if len(same) < DEATHS or not _share_a_layer(same):
        return None
    tried = range(min(loss.epoch for loss in same), last.epoch + 1)
    if any(loss not in same and loss.step in (last.step, None) and loss.epoch in tried for loss in losses):
        return None
    if len({loss.host for loss in same}) == 1 and any(loss.elsewhere for loss in same):
        return None  # that host may be to blame
    workers = ", ".join(str(loss.worker) for loss in same)
    return (
        f"micro-batch {last.micro_batch} of step {last.step} has ended or hung every worker that computed it ({workers}), and nothing else "
        "was lost at that step: it is probably the input, not a machine; look at the samples of that micro-batch"
    )


def does_not_fit(losses: Sequence[MicroBatchLoss]) -> str | None:
    """Returns a sentence if workers ran out of memory in the step of the last of these losses in as many views as DEATHS; else None."""
    last = losses[-1]
    same = [loss for loss in losses if loss.no_memory and loss.step == last.step is not None]
    if not last.no_memory or len({loss.epoch for loss in same}) < DEATHS:
        return None
    workers = ", ".join(str(loss.worker) for loss in same)
    return (
        f"each time that step {last.step} was tried, workers ran out of memory ({workers}): it does not fit. Use devices or hosts with "
        "more memory, more workers or stages, smaller micro-batches, or checkpoint_activations=True"
    )


def _share_a_layer(losses: Sequence[MicroBatchLoss]) -> bool:
    """Whether DEATHS of them computed the same layer; a worker's stage may have had other layers in each epoch."""
    counts = Counter(layer for loss in losses for layer in loss.layers)
    return max(counts.values(), default=0) >= DEATHS


def loss_of(view: View, death: Death, cause: str | None = None) -> MicroBatchLoss:
    """Returns what a member was doing when it died, as far as it recorded that. `cause` is the kind of the verdict that excluded it."""
    hosts = {member.worker: member.host for member in view.members}
    doing = death.doing
    did = doing if doing is not None and doing.phase in STEP_PHASES else None
    computing = did is not None and did.phase in ("forward", "backward") and did.micro_batch >= 0
    return MicroBatchLoss(
        worker=death.worker,
        epoch=view.epoch,
        step=None if did is None else did.step,
        micro_batch=did.micro_batch if did is not None and computing else None,
        layers=tuple(view.plan.stages[view.plan.stage_of(death.worker)].layers),
        own=death.own or cause in OWN,
        no_memory=death.no_memory,
        host=hosts[death.worker],
        elsewhere=len(set(hosts.values())) > 1,
    )
