"""In which steps members compare what all of them must compute alike: a checksum of one micro-batch's loss and gradients.

What the runtime does not know, such as a variable that the loop changes, may differ between workers: because one joined later, or has
seen fewer steps of a pass. So all are compared in the first step that a worker takes with others, and where passes over the data begin:
of the next one, and of all as long as any worker is there that came later; and again whenever this is a tiny part of what they compute.

A worker that has been there since the job began is *proven*, and so is one that was compared with a proven one. If none is left, nothing
shows whether the others have the right values: the user is warned, and they count as proven.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Collection

from elastic.engine.decision import Apply
from elastic.errors import MismatchError
from elastic.view import View

_log = logging.getLogger(__name__)

SHARE = 1e-3
"""How much of the micro-batches that a worker computes may be for comparison only in the middle of passes."""

_PASSES = 2

_ALONE = (
    "no worker is left that was compared with one of the first ones: if the loop uses a variable that it changes (a coefficient that "
    "decays with each epoch, a teacher model), it has its value from the start of train_fn again, and nothing shows it. Compute such a "
    "value from loader.report.step or the number of the epoch, or give it to loader.register_for_checkpointing"
)


class Likeness:
    """One worker's knowledge of whom it was compared with.

    `sample` computes the checksum for a step, or returns None where it cannot. It is done for each of the `updates` made with a batch.
    `proven`: this worker is one of the first ones.
    """

    def __init__(self, sample: Callable[[int], str | None], updates: int, *, proven: bool) -> None:
        self._sample, self._updates, self._proven = sample, updates, proven
        self._pass = 0  # the first step of the pass that has begun here
        self._passes: defaultdict[tuple[int, int], set[int]] = defaultdict(set)  # by worker and update: those in which it was compared
        self._last: dict[int, int] = {}  # by update: the newest step that was compared
        self._first: frozenset[int] | None = None if proven else frozenset()  # the members of the first view

    def begin(self, step: int) -> None:
        """Notes that a pass begins with this step of the loop."""
        self._pass = step

    def takes(self, step: int, view: View) -> bool:
        """Whether members are compared in this step; all say the same."""
        update = step % self._updates
        if self._first is None:
            self._first = frozenset(view.workers if view.epoch == 1 else ())
        if len(view.workers) < 2:
            self._trust(unproven=not self._proven)
            return False
        if any(self._is_new(worker, update) for worker in view.workers):
            return True
        since = (step - self._last.get(update, 0)) // self._updates * view.workload.micro_batches / len(view.workers)
        return since >= 1 / SHARE or (step // self._updates == self._pass and not self._first.issuperset(view.workers))

    def _is_new(self, worker: int, update: int) -> bool:
        passes = self._passes[worker, update]
        return len(passes) < _PASSES and self._pass not in passes

    def sampled(self, step: int) -> tuple[bool, str] | None:
        """Returns whether this worker is proven, and the checksum; None if it cannot be computed now."""
        found = self._sample(step)
        return None if found is None else (self._proven, found)

    def committed(self, answer: Apply, worker: int) -> None:
        """Notes who was compared with this worker. Raises MismatchError if workers differ."""
        if answer.stray is not None:
            raise MismatchError(_unlike(answer.stray, answer.step // self._updates, self._equal_at(answer)))
        if worker in answer.alike:
            self._note(answer.step, answer.alike)
            self._trust(unproven=answer.unproven, says=worker == answer.alike[0])

    def _trust(self, *, unproven: bool, says: bool = True) -> None:
        if unproven and says:
            _log.warning(_ALONE)
        self._proven = True

    def _note(self, step: int, workers: Collection[int]) -> None:
        update = step % self._updates
        for each in workers:
            if len(self._passes[each, update]) < _PASSES:
                self._passes[each, update].add(self._pass)
        self._last[update] = step

    def _equal_at(self, answer: Apply) -> int | None:
        """Returns the newest step in which all that were compared now were found alike; None if one of them is new."""
        update = answer.step % self._updates
        if not all(self._passes[worker, update] for worker in answer.alike):
            return None
        return self._last[update] // self._updates if update in self._last else None


def _unlike(who: str, step: int, equal_at: int | None) -> str:
    """Says that these workers compute other gradients than the others."""
    since = "" if equal_at is None else f" They were equal in step {equal_at}: what has been trained since then may be wrong."
    return (
        f"step {step} cannot be taken: {who} found other gradients than other workers for the same micro-batch of it, with the same "
        f"parameters and random numbers.{since} The body of the loop uses a value that differs between workers: most likely a variable "
        "that the loop changes, and that a worker which joins has from the start of train_fn (a coefficient that decays with each epoch, a "
        "teacher model, a queue), and a checkpoint does not have either; or one of its worker's number, host or environment. Compute such "
        "a value from loader.report.step, or from the number of the epoch that loader.epochs yields; or keep it in an object with "
        "state_dict and load_state_dict, change it where loader.report is not None, and give it to loader.register_for_checkpointing. If "
        "the body has none, the processors of these hosts compute other bits (fix isa=). exact=False allows it"
    )
