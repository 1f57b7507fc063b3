"""In which steps members compare what all of them must compute alike: a checksum of one micro-batch's loss and gradients.

What the runtime does not know, such as a variable that the loop changes, may differ between workers: because one joined later, or has
seen fewer steps of a pass. So all are compared in the first step that a worker takes with others, and in their first one of the next
pass over the data; and again whenever this costs no more than a thousandth of what they compute.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection

from elastic.engine.decision import Apply
from elastic.errors import MismatchError
from elastic.view import View

SHARE = 1e-3
"""How much of the micro-batches that a worker computes may be for comparison only, behind the first two."""

_PASSES = 2


class Likeness:
    """One worker's knowledge of whom it was compared with.

    `sample` computes the checksum for a step, or returns None where it cannot. It is done for each of the `updates` made with a batch.
    """

    def __init__(self, sample: Callable[[int], str | None], updates: int) -> None:
        self._sample, self._updates = sample, updates
        self._pass = 0
        self._passes: defaultdict[tuple[int, int], set[int]] = defaultdict(set)  # by worker and update: those in which it was compared
        self._last: dict[int, int] = {}  # by update: the newest step that was compared

    def begin(self, end: int) -> None:
        """Notes that a pass begins, behind whose end so many steps have been taken."""
        self._pass = end

    def takes(self, step: int, view: View) -> bool:
        """Whether members are compared in this step; all say the same."""
        update = step % self._updates
        if len(view.workers) < 2:
            return False
        each = self._updates * math.ceil(len(view.workers) / (view.workload.micro_batches * SHARE))
        return step >= self._last.get(update, -math.inf) + each or any(self._is_new(worker, update) for worker in view.workers)

    def _is_new(self, worker: int, update: int) -> bool:
        passes = self._passes[worker, update]
        return len(passes) < _PASSES and self._pass not in passes

    def sampled(self, step: int) -> tuple[bool, str] | None:
        """Returns whether this worker has been compared before, and the checksum; None if it cannot be computed now."""
        found = self._sample(step)
        return None if found is None else (bool(self._last), found)

    def committed(self, answer: Apply, worker: int) -> None:
        """Notes who was compared with this worker. Raises MismatchError if workers differ."""
        if answer.stray is not None:
            raise MismatchError(_unlike(answer.stray, answer.step // self._updates, self._equal_at(answer.step)))
        self._note(answer.step, answer.alike if worker in answer.alike else ())

    def _note(self, step: int, workers: Collection[int]) -> None:
        update = step % self._updates
        for each in workers:
            if len(self._passes[each, update]) < _PASSES:
                self._passes[each, update].add(self._pass)
        if workers:
            self._last[update] = step

    def _equal_at(self, step: int) -> int | None:
        last = self._last.get(step % self._updates)
        return None if last is None else last // self._updates


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
