"""What an `Accelerator` can do but an elastic job has no place for, with the reason and the way out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, RandomSampler

from elastic.errors import TrainerError
from elastic.worker.job import Job
from elastic.worker.plain.loop import Place


def check(accelerator: Accelerator, job: Job) -> None:
    """Raises TrainerError for settings that cannot be exact, or have another place."""
    if accelerator.use_distributed:
        raise TrainerError(
            f"Accelerate counts {accelerator.num_processes} processes by itself: start the script by `elastic run` or elastic.run, not by "
            "accelerate launch, and leave FSDP, DeepSpeed and Megatron-LM out: the runtime shards the optimizer's state itself"
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise TrainerError(f"mixed_precision={accelerator.mixed_precision!r} needs scales, which one worker cannot decide: use 'bf16'")
    if accelerator.log_with:
        raise TrainerError(
            "log_with= would write from the main process, which may die: use elastic.run(log=...) or `elastic run --log`, such as "
            "tensorboard:DIR, and loader.log(path, name=value) for values of your own"
        )
    compiling = accelerator.state.dynamo_plugin
    if compiling is not None and compiling.backend != DynamoBackend.NO:
        raise TrainerError("dynamo_backend= (or ACCELERATE_DYNAMO_BACKEND) is set: call model.compile() before prepare() instead")
    if accelerator.device.type != torch.device(job.device).type:
        raise TrainerError(f"Accelerate would compute on {accelerator.device}, but the job's workers on {job.device}: leave cpu= out")


def check_without_optimizer(given: Sequence[Any]) -> None:
    """Raises TrainerError for a scheduler that is prepared without its optimizer."""
    if any(is_scheduler(each) for each in given):
        raise TrainerError("prepare() gets a scheduler without its optimizer: give it model, optimizer, loader and scheduler in one call")


def is_scheduler(given: Any) -> bool:
    """Returns whether it is a scheduler of learning rates."""
    return hasattr(given, "optimizer") and callable(getattr(given, "step", None))


def one_of_each(given: Sequence[Any], optimizers: Sequence[Optimizer], again: bool) -> tuple[nn.Module, Optimizer, DataLoader[Any], Any]:
    """Returns the model, the optimizer, the training's loader and the scheduler (None if there is none).

    Raises:
        TrainerError: unless there is one of each, or if the training was prepared before.
    """
    models = [each for each in given if isinstance(each, nn.Module)]
    loaders = [each for each in given if isinstance(each, DataLoader)]
    schedulers = [each for each in given if is_scheduler(each)]
    if again:
        raise TrainerError("prepare() gets an optimizer for the second time: a job trains one model with one optimizer; start another job")
    if (len(models), len(optimizers)) != (1, 1) or len(schedulers) > 1 or not loaders:
        raise TrainerError(
            f"prepare() gets {len(models)} models, {len(optimizers)} optimizers, {len(schedulers)} schedulers and {len(loaders)} "
            "DataLoaders: give it one model, its optimizer, the training's loader and its scheduler, if there is one, in one call; then "
            "other loaders. Prepare models that are not trained in another call"
        )
    shuffled = [isinstance(loader.sampler, RandomSampler) for loader in loaders]
    if any(shuffled) and not shuffled[0]:
        raise TrainerError("prepare() gets several DataLoaders, and a later one is shuffled: give the training's loader first")
    return models[0], optimizers[0], loaders[0], schedulers[0] if schedulers else None


def check_save(asked: Any, directory: Any) -> None:
    """Raises TrainerError if a save has no directory, or another than the training's."""
    if directory is None:
        raise TrainerError(
            "save_state() has no directory that the job knows from the beginning: give ElasticAccelerator(prepare_options={'checkpoint': "
            "'runs/a', 'every': 100}), from which the job also continues"
        )
    if asked is not None and os.path.abspath(asked) != os.path.abspath(directory):
        raise TrainerError(f"save_state({asked!r}): one training has one directory, which is {directory}; leave the argument out")


def check_gather(place: Place) -> None:
    """Raises TrainerError in the middle of a step."""
    if place in (Place.BODY, Place.TAIL):
        raise TrainerError(
            "gather() in the body of the loop would join values of micro-batches, of which workers have different numbers: use "
            "loader.report.loss where loader.report is not None. In evaluation each worker has all of the data"
        )
