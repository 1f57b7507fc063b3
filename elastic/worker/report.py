"""The report that a loop receives for each committed step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One committed step. `loss` is its mean loss, `lr` the first group's learning rate in it, `grad_norm` the norm before clipping.

    `tokens_per_second` is 0 unless the model's input is integer ids of shape (samples, tokens). `leader` is true on one worker. Lines
    written only on the leader are lost for a step in whose loop body it dies: `trainer.log` writes each step once.
    `stopped`: the job was asked to stop, and this step is its last. `skipped` is the reason why the step was skipped (`on_nonfinite=`).
    `copy_wait_s`: how many seconds the step waited on this worker for the copy of the state in host memory; 0.0 on the CPU, and wherever
    the copy is over before the step's gradients are. `losses` are those of the updates of a step of a plain loop that makes several, in
    order; then `loss`, `lr` and `grad_norm` are the last one's. `mfu`, from 0 to 1, is the share of what the devices can do at most that
    the model's floating-point operations took (model FLOPs utilization); None if either is unknown.
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
    copy_wait_s: float = 0.0
    losses: tuple[float, ...] = ()
    mfu: float | None = None
