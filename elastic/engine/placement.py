"""Puts a user's model, and what its optimizer holds already, on the device that this worker computes on."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from elastic.errors import TrainerError
from elastic.memory import device


def place_model(root: nn.Module) -> None:
    """Moves the model to this worker's device. Its parameters stay the same objects, so that an optimizer made before keeps them.

    Raises:
        TrainerError: if layers lie on different devices, or on one that this worker does not have.
    """
    where: dict[torch.device, str] = {}
    for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
        where.setdefault(tensor.device, name)
    if len(where) > 1:
        named = ", ".join(f"{name} on {each}" for each, name in where.items())
        raise TrainerError(f"the model's tensors lie on different devices: {named}. Build it on the CPU: each worker moves its layers")
    own = device.current()
    for found, name in where.items():
        if found not in (own, device.CPU):
            raise TrainerError(
                f"{name} is on {found}, but this worker computes on {own}: build the model on the CPU, or on job.device; which device a "
                f"worker has is decided by elastic.run(device=...)"
            )
        if found != own:
            _move(root, own)


def _move(root: nn.Module, own: torch.device) -> None:
    before = dict(root.named_parameters())
    _need(root, own)
    root.to(own)
    if replaced := next((name for name, each in root.named_parameters() if each is not before.get(name)), None):
        raise TrainerError(f"torch cannot move parameter {replaced} to {own} and keep the object: build the model on job.device")


def _need(root: nn.Module, own: torch.device) -> None:
    """Raises TrainerError if the device has no room for the whole model, of which this worker then keeps its own layers."""
    free = device.free_bytes()
    need = sum(tensor.nbytes for tensor in [*root.parameters(), *root.buffers()])
    if free is not None and need > free[0]:
        raise TrainerError(
            f"the model has {need:,} bytes, but {own} has {free[0]:,} free of {free[1]:,}: nothing was trained. Use larger devices, end "
            "what else uses this one, or give the Trainer a function, or a list of functions, one a layer: then a worker builds only "
            "its own layers"
        )


def place_state(optimizer: Optimizer) -> None:
    """Moves the state that an optimizer holds already to its parameters' device; numbers stay where they are."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim and value.device != parameter.device:
                state[name] = value.to(parameter.device)
