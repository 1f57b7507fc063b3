"""What a plain loop cannot be made exact with, with the reason and the way out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from elastic.errors import TrainerError
from elastic.worker.refusals import check_model

_OF_THE_LOOP = {
    "clip_norm": "call job.clip_grad_norm_(max_norm) in the body, after backward()",
    "autocast": "use torch.autocast in the body",
    "checkpoint_activations": "use torch.utils.checkpoint in the model",
    "loss": "compute it in the body",
    "data": "it is the third argument",
}
OPTIONS = ("exact", "grains", "on_nonfinite", "checkpoint", "every", "keep", "checkpoint_files", "names")


def check_module(model: nn.Module) -> None:
    """Raises TrainerError for a module that communicates by itself, or has no values."""
    check_model(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise TrainerError(f"parameter {name} is on the device meta, without values: make the model on the device that computes")


def check_optimizers(optimizers: Sequence[Optimizer], schedulers: Sequence[Any]) -> None:
    """Raises TrainerError unless the runtime knows the schedulers of all optimizers, and no others."""
    for scheduler in schedulers:
        if not any(getattr(scheduler, "optimizer", optimizer) is optimizer for optimizer in optimizers):
            raise TrainerError("the scheduler belongs to another optimizer: make it with the optimizer that is given to job.prepare")
    scheduled = [getattr(scheduler, "optimizer", optimizers[0]) for scheduler in schedulers]
    for optimizer in optimizers:
        if not any(optimizer is each for each in scheduled):
            check_schedulers(optimizer)


def check_schedulers(optimizer: Optimizer) -> None:
    """Raises TrainerError if a scheduler was made from an optimizer without being given to `prepare`. Schedulers mark the optimizer."""
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        raise TrainerError(
            "a learning rate scheduler was made for the optimizer, but job.prepare does not know it, so it would be stepped with every "
            "micro-batch: write `model, optimizer, loader, scheduler = job.prepare(model, optimizer, data, scheduler=scheduler, ...)`, and "
            "make the scheduler before"
        )


def check_options(options: dict[str, Any]) -> None:
    """Raises TrainerError for an argument that `prepare` does not have."""
    for name in options:
        if name not in OPTIONS:
            advice = _OF_THE_LOOP.get(name, f"of Trainer's arguments it has {', '.join(OPTIONS)}")
            raise TrainerError(f"job.prepare has no argument {name}=: {advice}")
