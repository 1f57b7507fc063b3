"""What a script for another launcher does that cannot be made exact, with the reason and the way out."""

from __future__ import annotations

import torch
from torch import nn

from elastic.errors import TrainerError

_WRAPPERS = {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"}
_INSTEAD_OF_EXIT = (
    "To end a loop early, leave it by `break` after the same step on every worker (in a plain loop where loader.report is not None), and "
    "return from train_fn; to end with an error, raise an exception"
)
_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NO_RANK = (
    "A worker has no rank, since their number changes: leave out init_process_group, what needs it (barriers, all_reduce of metrics), and "
    "variables such as RANK and LOCAL_RANK. The runtime connects the workers itself; job.worker, job.leader and job.device say who and "
    "where they are"
)
_NO_CUDA = ("Torch not compiled with CUDA", "No CUDA GPUs are available", "Found no NVIDIA driver", "No NVIDIA driver")
_ON_THE_CPU = (
    "Build the model and the optimizer on the CPU: each worker moves what it has to its own device, job.device, which `device=` of "
    "elastic.run (`--device`) chooses"
)


def check_process() -> None:
    """Raises TrainerError if the script has made a process group of its own."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise TrainerError(
            "train_fn has called torch.distributed.init_process_group, but a group cannot go on without a lost worker: leave it out, and "
            "what needs it (barriers, all_reduce of metrics); the runtime connects the workers itself"
        )


def check_model(model: nn.Module, where: str = "the model") -> None:
    """Raises TrainerError for a module that communicates by itself."""
    for name, module in model.named_modules():
        found = next((base.__name__ for base in type(module).__mro__ if base.__name__ in _WRAPPERS), None)
        if found is not None:
            place = f"module {name} of {where}" if name else where
            raise TrainerError(f"{place} is wrapped in {found}, which would average gradients by itself: give the module inside of it")
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "placements"):
            raise TrainerError(f"parameter {name} is a DTensor, made by FSDP or tensor parallelism: give the model as it was before")


def advice(error: BaseException) -> str:
    """Returns what to do about an exception of the script's own, where its text does not say that; else an empty text."""
    text = "" if isinstance(error, SystemExit) else str(error)
    if isinstance(error, SystemExit):
        return _INSTEAD_OF_EXIT
    if isinstance(error, KeyError) and error.args[:1] and error.args[0] in _OF_A_RANK:
        return _NO_RANK
    if isinstance(error, ValueError) and "Error initializing torch.distributed" in text:
        return _NO_RANK
    return _ON_THE_CPU if isinstance(error, AssertionError | RuntimeError) and any(words in text for words in _NO_CUDA) else ""
