"""One run of the user's loop body: what it has called so far, and what it must not call.

A body calls `backward` once or more often, then `optimizer.step()` once. Everything else has another meaning than in a plain loop, or none,
and is refused with the reason and the way out.

With several optimizers a body has parts. Each is some backwards and the steps of one or more optimizers behind them, and is an update of
its own. The first body shows which parts there are; all others have the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

import torch
from torch import nn

from elastic.errors import TrainerError
from elastic.worker.plain.body import checksum

Parts = tuple[tuple[int, ...], ...]
"""Of each part of a body, the numbers of the optimizers that it steps, in order."""

ONE: Parts = ((0,),)


class Kind(Enum):
    """What becomes of a body's gradients."""

    TRIAL = auto()  # dropped: the loop is tried out before this worker takes part
    WORK = auto()  # added to the step's
    EXTRA = auto()  # dropped: another worker has the micro-batch, and this one has no other for its loop


@dataclass(slots=True, kw_only=True)
class Part:
    """What a body has called in one of its parts."""

    losses: list[torch.Tensor] = field(default_factory=list)
    clip_norm: float | None = None
    weight: float | None = None
    stepped: list[int] = field(default_factory=list)

    def total(self) -> torch.Tensor:
        """Returns the sum of the losses, in the order of their backwards."""
        first, *rest = self.losses
        for loss in rest:
            first = first + loss
        return first


@dataclass(slots=True, kw_only=True)
class Iteration:
    """The run of a body on one micro-batch of a step. Times are seconds of the clock that the loop uses.

    `parts` is None in the body that shows them. `live` is the part whose gradients count, None if none does.
    """

    kind: Kind
    step: int
    micro_batch: int
    parts: Parts | None = ONE
    live: int | None = 0
    began: float = 0.0
    backward_at: float | None = None
    ended: float = 0.0
    run: list[Part] = field(default_factory=lambda: [Part()])
    _versions: dict[int, tuple[torch.Tensor, int]] = field(default_factory=dict)
    _checksums: dict[int, str] = field(default_factory=dict)
    _left: set[int] = field(default_factory=set)  # parameters that had a gradient of an earlier part when this one began

    @property
    def where(self) -> str:
        """The micro-batch and the step, for messages."""
        return f"the body of the loop (step {self.step}, micro-batch {self.micro_batch})"

    @property
    def part(self) -> Part:
        """The newest part."""
        return self.run[-1]

    @property
    def number(self) -> int:
        """The newest part's number."""
        return len(self.run) - 1

    @property
    def lives(self) -> bool:
        """Whether gradients are needed now: this part's count, or it is not known yet which parts there are."""
        return self.parts is None or self.number == self.live

    @property
    def part_ended(self) -> bool:
        """Whether the newest part has made all its optimizers' steps. Never true in the body that shows the parts."""
        return self.parts is not None and self.number < len(self.parts) and len(self.part.stepped) == len(self.parts[self.number])

    @property
    def over(self) -> bool:
        """Whether all parts are made. In the body that shows them, whether they may be."""
        if self.parts is None:
            return bool(self.part.stepped)
        return self.part_ended and self.number == len(self.parts) - 1

    @property
    def shown(self) -> Parts:
        """The parts that the body has made."""
        return tuple(tuple(part.stepped) for part in self.run)

    def goes_backward(self, parameters: Iterable[nn.Parameter]) -> None:
        """Notes that a `backward` begins. Raises TrainerError if the optimizers' steps were called before."""
        if self.part.stepped and self.parts is None:
            self.next_part()
        if self.parts is None and not self.part.losses:
            self._left = {id(each) for each in parameters if each.grad is not None and bool(each.grad.any())}
        if not self.part.stepped:
            return
        if self.over:
            raise TrainerError(f"{self.where} calls backward() after optimizer.step(): these gradients would be in no step. Call it before")
        raise TrainerError(f"{self.where} calls backward() where {self._differs}")

    def next_part(self) -> None:
        """Begins another part."""
        self.run.append(Part())

    @property
    def _differs(self) -> str:
        assert self.parts is not None
        place = len(self.part.stepped)
        wanted = self.parts[self.number][place]
        return (
            f"the first body called the step of optimizer {wanted}: all bodies must call backward and the optimizers' steps in the same "
            "order. To train a part of the model less often, give it a learning rate of 0 in other steps, where loader.report is not None"
        )

    def went_backward(self, loss: torch.Tensor, parameters: Iterable[nn.Parameter]) -> None:
        """Notes that `backward` of a loss has returned."""
        self.part.losses.append(loss.detach())
        found = [(id(each), gradient) for each in parameters if (gradient := each.grad) is not None]
        self._versions = {key: (gradient, gradient._version) for key, gradient in found}
        if self.kind is Kind.TRIAL:
            self._checksums = {key: checksum([gradient]) for key, gradient in found}

    def steps(self, optimizer: int, parameters: Sequence[nn.Parameter]) -> None:
        """Notes a call of the step of an optimizer over these parameters.

        Raises:
            TrainerError: if it is the second one, there was no backward, gradients were changed since, or other bodies do not call it here.
        """
        if optimizer in self.part.stepped:
            raise TrainerError(
                f"{self.where} calls optimizer.step() twice: the runtime makes one update of each step, with the gradients of all its "
                "micro-batches. Call it once, at the end of the body"
            )
        if not self.part.losses:
            raise TrainerError(
                f"{self.where} calls optimizer.step() without backward(): the micro-batch would have no gradient. Call loss.backward() "
                "before it in every body; to leave samples out, multiply their loss by 0"
            )
        if self._changed(parameters):
            raise TrainerError(
                f"{self.where} changes gradients between backward() and optimizer.step(): they are those of one micro-batch, not yet the "
                "step's. To clip, call job.clip_grad_norm_(max_norm) instead of torch.nn.utils.clip_grad_norm_; for other changes use "
                "parameter.register_hook(f), which acts on each micro-batch"
            )
        if self._left and any(id(each) in self._left for each in parameters):
            raise TrainerError(
                f"{self.where} calls the step of optimizer {optimizer} with gradients that the backward of an earlier update has left in "
                "its parameters: call its zero_grad() before the backward of its own loss (or detach what that loss must not train)"
            )
        if self.parts is not None and self.parts[self.number][len(self.part.stepped)] != optimizer:
            raise TrainerError(f"{self.where} calls the step of optimizer {optimizer} where {self._differs}")
        self.part.stepped.append(optimizer)

    def _changed(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether gradients are others than backward has left. A change through `.data` shows in a trial only, by their checksum."""
        left = [each for each in parameters if each.grad is not None and id(each) in self._versions]
        known = [(id(each), each.grad, *self._versions[id(each)]) for each in left]
        if any(now is not gradient or gradient._version != version for _, now, gradient, version in known):
            return True
        return self.kind is Kind.TRIAL and any(self._checksums[key] != checksum([now]) for key, now, *_ in known)

    def clips(self, max_norm: float) -> None:
        """Notes a call of `job.clip_grad_norm_`. Raises TrainerError if it comes too late."""
        if self.part.stepped or not self.part.losses:
            raise TrainerError(f"{self.where} clips too early or late: call job.clip_grad_norm_() between backward() and optimizer.step()")
        self.part.clip_norm = max_norm

    def weighted(self, loss: torch.Tensor, weight: float) -> torch.Tensor:
        """`job.weighted`. Raises TrainerError if it comes too late, or for another weight than the part's."""
        if not (math.isfinite(weight) and weight >= 0):
            raise TrainerError(f"{self.where} gives its loss the weight {weight}: a weight is finite and not below 0")
        if self.part.stepped and self.parts is None:
            self.next_part()
        if self.part.stepped or (self.part.losses and self.part.weight is None):
            raise TrainerError(f"{self.where} calls job.weighted() behind backward(): use its result in the place of the loss")
        if self.part.weight not in (None, weight):
            raise TrainerError(f"{self.where} gives its losses the weights {self.part.weight} and {weight}: a micro-batch has one weight")
        self.part.weight = weight
        return loss * weight if weight else torch.nan_to_num(loss, 0.0, 0.0, 0.0) * 0.0

    def check_end(self) -> None:
        """Raises TrainerError if the body has ended without the optimizers' steps."""
        if self.over:
            return
        if self.parts not in (None, ONE) and (self.number or self.part.stepped):
            raise TrainerError(f"{self.where} ended where {self._differs}")
        if self.part.losses:
            raise TrainerError(
                f"{self.where} ended without a call of optimizer.step() (of the optimizer that job.prepare returned). To accumulate "
                "gradients, call it in every body: batch_size= is the number of samples of an update, micro_batch_size= that of a body, "
                "and the loss need not be divided"
            )
        raise TrainerError(
            f"{self.where} ended without backward() and optimizer.step(): every micro-batch counts in its step. Call both in every body; "
            "to leave samples out, multiply their loss by 0"
        )
