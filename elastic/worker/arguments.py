"""Checks and converts a Trainer's arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from elastic.errors import TrainerError
from elastic.plan.workload import default_grains


def cut_batch(batch_size: int, micro_batch_size: int, grains: int | None) -> tuple[int, int]:
    """Returns the number of micro-batches and of grains. Raises TrainerError if they do not divide the batch."""
    if batch_size < 1 or micro_batch_size < 1:
        raise TrainerError(f"batch_size ({batch_size}) and micro_batch_size ({micro_batch_size}) must be at least 1")
    micro_batches, rest = divmod(batch_size, micro_batch_size)
    if rest:
        raise TrainerError(
            f"a batch of {batch_size} samples cannot be cut into micro-batches of {micro_batch_size}: choose a multiple of it, such as "
            f"{max(1, micro_batches) * micro_batch_size} or {(micro_batches + 1) * micro_batch_size}"
        )
    if grains is None:
        return micro_batches, default_grains(micro_batches)
    if grains < 1 or micro_batches % grains:
        raise TrainerError(
            f"{micro_batches} micro-batches cannot be cut into {grains} grains of equal size: choose a divisor of {micro_batches}, "
            f"such as {default_grains(micro_batches)}"
        )
    return micro_batches, grains


def check_choices(clip_norm: float | None, on_nonfinite: str) -> None:
    """Raises TrainerError for a `clip_norm` that is not above 0, or an unknown `on_nonfinite`."""
    if clip_norm is not None and not clip_norm > 0:
        raise TrainerError(f"clip_norm is {clip_norm}; it must be above 0, or None for no clipping")
    if on_nonfinite not in ("raise", "skip"):
        raise TrainerError(
            f'on_nonfinite={on_nonfinite!r}: use "raise" to end the job at a step that is not finite, or "skip" to skip the step'
        )


def one_optimizer(given: Any, parameters: list[nn.Parameter]) -> Optimizer:
    """Returns the given optimizer, or the one that the given function makes. Raises TrainerError for anything else."""
    made = given if isinstance(given, Optimizer) or not callable(given) else given(parameters)
    if isinstance(made, Optimizer):
        return made
    if isinstance(made, list | tuple | dict):
        raise TrainerError(
            f"optimizer is a {type(made).__name__}, but a Trainer has one optimizer: give one with several parameter groups, which may "
            "have different settings (a separate optimizer for each part of the model, as in GANs, is not supported)"
        )
    raise TrainerError(f"optimizer is a {type(made).__name__}: give a torch.optim.Optimizer, or a function that makes one from parameters")


def bind_scheduler(scheduler: Any, optimizer: Optimizer) -> Any:
    """Returns the given scheduler, or the one that the given function makes. Raises TrainerError if it belongs to another optimizer."""
    if scheduler is None:
        return None
    bound = scheduler if hasattr(scheduler, "optimizer") else scheduler(optimizer)
    if getattr(bound, "optimizer", optimizer) is not optimizer:
        raise TrainerError("the scheduler belongs to another optimizer: make it with the optimizer that is given to the Trainer")
    return bound


def checkpointing_of(choice: bool | Callable[[int, nn.Module], bool]) -> Callable[[int, nn.Module], bool] | None:
    """Returns a function of index and layer that selects the layers to checkpoint (to keep only inputs of); None for no layer."""
    if choice is True:
        return lambda index, layer: True
    return choice if callable(choice) else None


def group_values(optimizer: Optimizer) -> list[dict[str, str]]:
    """Returns each parameter group's settings as text."""
    return [{name: repr(value) for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
