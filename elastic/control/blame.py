"""Whether an input is to blame for deaths: decided from what was lost alone, whoever brought it about. Pure.

An input kills whoever computes it, and nobody else. So it is to blame if the same micro-batch in the same layers has killed three workers,
each by its own process's doing, and nothing else was lost while that step was tried. What is killed from outside is never blamed on it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

DEATHS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchLoss:
    """A member of view `epoch` that was lost while it was in `step`; None where it was between steps, or nobody knows.

    `micro_batch` is what it computed in its `layers` then, None if it did not compute. `own`: its process ended by its own doing. `host` is
    where it ran, `elsewhere` whether others of the job ran on another one.
    """

    worker: int
    epoch: int
    step: int | None = None
    micro_batch: int | None = None
    layers: tuple[int, ...] = ()
    own: bool = False
    host: str = ""
    elsewhere: bool = False


def blamed(losses: Sequence[MicroBatchLoss]) -> str | None:
    """The sentence that blames the input for the last of these losses, None if it may be something else."""
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
        f"micro-batch {last.micro_batch} of step {last.step} has ended every worker that computed it ({workers}), and nothing else was "
        "lost at that step: it is probably the input, not a machine; look at the samples of that micro-batch"
    )


def _share_a_layer(losses: Sequence[MicroBatchLoss]) -> bool:
    """Whether enough of them computed the same layer; its stage may have had other layers in each epoch."""
    counts = Counter(layer for loss in losses for layer in loss.layers)
    return max(counts.values(), default=0) >= DEATHS
