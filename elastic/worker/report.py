"""What a loop is given for each committed step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One committed step. `loss` is its mean, `lr` the first group's rate that it was taken with, `grad_norm` the norm before clipping.

    `tokens_per_second` is 0 where the model's input is not integer ids of shape (samples, tokens). `leader` is true on one worker.
    What is written where it is, is lost for a step in whose loop body the leader dies: `trainer.log` writes each step once.
    `stopped` says that the job was asked to stop and this step is its last, `skipped` why the step was passed over (`on_nonfinite=`).
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    samples_per_second: float
    tokens_per_second: float
    epoch: int
    workers: int
    layout: str
    leader: bool
    stopped: bool = False
    skipped: str | None = None
