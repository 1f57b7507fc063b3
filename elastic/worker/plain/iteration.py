"""One run of the user's loop body: what it has called so far, and what it must not call.

A body calls `backward` once or more often, then `optimizer.step()` once. Everything else has another meaning than in a plain loop, or none,
and is refused with the reason and the way out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

import torch
from torch import nn

from elastic.errors import TrainerError


class Kind(Enum):
    """What becomes of a body's gradients."""

    TRIAL = auto()  # dropped: the loop is tried out before this worker takes part
    WORK = auto()  # added to the step's
    EXTRA = auto()  # dropped: another worker has the micro-batch, and this one has no other for its loop


@dataclass(slots=True, kw_only=True)
class Iteration:
    """The run of a body on one micro-batch of a step. Times are seconds of the clock that the loop uses."""

    kind: Kind
    step: int
    micro_batch: int
    began: float = 0.0
    backward_at: float | None = None
    ended: float = 0.0
    losses: list[torch.Tensor] = field(default_factory=list)
    clip_norm: float | None = None
    weight: float | None = None
    stepped: bool = False
    _versions: list[tuple[torch.Tensor, int]] = field(default_factory=list)

    @property
    def where(self) -> str:
        """The micro-batch and the step, for messages."""
        return f"the body of the loop (step {self.step}, micro-batch {self.micro_batch})"

    def went_backward(self, loss: torch.Tensor, parameters: Iterable[nn.Parameter]) -> None:
        """Notes that `backward` of a loss has returned. Raises TrainerError if the optimizer's step was called before."""
        if self.stepped:
            raise TrainerError(f"{self.where} calls backward() after optimizer.step(): these gradients would be in no step. Call it before")
        self.losses.append(loss.detach())
        self._versions = [(gradient, gradient._version) for each in parameters if (gradient := each.grad) is not None]

    def steps(self) -> None:
        """Notes a call of the optimizer's step.

        Raises:
            TrainerError: if it is the second one, there was no backward, or gradients were changed since.
        """
        if self.stepped:
            raise TrainerError(
                f"{self.where} calls optimizer.step() twice: the runtime makes one update of each step, with the gradients of all its "
                "micro-batches. Call it once, at the end of the body"
            )
        if not self.losses:
            raise TrainerError(
                f"{self.where} calls optimizer.step() without backward(): the micro-batch would have no gradient. Call loss.backward() "
                "before it in every body; to leave samples out, multiply their loss by 0"
            )
        if any(gradient._version != version for gradient, version in self._versions):
            raise TrainerError(
                f"{self.where} changes gradients between backward() and optimizer.step(): they are those of one micro-batch, not yet the "
                "step's. To clip, call job.clip_grad_norm_(max_norm) instead of torch.nn.utils.clip_grad_norm_; for other changes use "
                "parameter.register_hook(f), which acts on each micro-batch"
            )
        self.stepped = True

    def clips(self, max_norm: float) -> None:
        """Notes a call of `job.clip_grad_norm_`. Raises TrainerError if it comes too late."""
        if self.stepped or not self.losses:
            raise TrainerError(f"{self.where} clips too early or late: call job.clip_grad_norm_() between backward() and optimizer.step()")
        self.clip_norm = max_norm

    def weighted(self, loss: torch.Tensor, weight: float) -> torch.Tensor:
        """`job.weighted`. Raises TrainerError if it comes too late, or for another weight than the body's."""
        if not (math.isfinite(weight) and weight >= 0):
            raise TrainerError(f"{self.where} gives its loss the weight {weight}: a weight is finite and not below 0")
        if self.stepped or (self.losses and self.weight is None):
            raise TrainerError(f"{self.where} calls job.weighted() behind backward(): use its result in the place of the loss")
        if self.weight not in (None, weight):
            raise TrainerError(f"{self.where} gives its losses the weights {self.weight} and {weight}: a micro-batch has one weight")
        self.weight = weight
        return loss * weight if weight else torch.nan_to_num(loss, 0.0, 0.0, 0.0) * 0.0

    def check_end(self) -> None:
        """Raises TrainerError if the body has ended without the optimizer's step."""
        if self.stepped:
            return
        if self.losses:
            raise TrainerError(
                f"{self.where} ended without a call of optimizer.step() (of the optimizer that job.prepare returned). To accumulate "
                "gradients, call it in every body: batch_size= is the number of samples of an update, micro_batch_size= that of a body, "
                "and the loss need not be divided"
            )
        raise TrainerError(
            f"{self.where} ended without backward() and optimizer.step(): every micro-batch counts in its step. Call both in every body; "
            "to leave samples out, multiply their loss by 0"
        )

    def total(self) -> torch.Tensor:
        """Returns the sum of the body's losses, in the order of their backwards."""
        first, *rest = self.losses
        for loss in rest:
            first = first + loss
        return first
