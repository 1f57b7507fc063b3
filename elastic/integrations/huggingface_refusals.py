"""Arguments of a transformers `Trainer` that an elastic job has no place for, with the reason and the way out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import transformers

from elastic.errors import TrainerError
from elastic.integrations.turns import overridden
from elastic.worker.job import Job

_REFUSED = {
    "fp16": "float16 needs a loss scale, which one worker cannot decide by its micro-batch: use bf16=True",
    "deepspeed": "the runtime shards the optimizer's state itself: leave it out",
    "fsdp": "the runtime shards the optimizer's state itself: leave it out",
    "auto_find_batch_size": "a batch size that is found by running out of memory could differ between workers: give a smaller "
    "per_device_train_batch_size and a larger gradient_accumulation_steps, which takes as much memory as one micro-batch",
    "torch_compile": "call model.compile() before, which compiles the model in place",
    "eval_on_start": "the workers do not know each other yet, and one that joins later is not at the start: call trainer.evaluate() before "
    "trainer.train()",
    "enable_jit_checkpoint": "the job saves by itself when it gets SIGTERM: leave it out",
    "include_num_input_tokens_seen": "each worker sees only its own tokens: trainer.steps.report.tokens_per_second has those of all",
    "torch_empty_cache_steps": "it would count each worker's own micro-batches: leave it out",
}


def check_arguments(arguments: Any, job: Job) -> None:
    """Raises TrainerError for what cannot be exact, or has another place."""
    for name, advice in _REFUSED.items():
        value = getattr(arguments, name, None)
        if value not in (None, False, "", "no", []):
            raise TrainerError(f"TrainingArguments({name}={value!r}) cannot be used in a job: {advice}")
    if arguments.device.type != torch.device(job.device).type:
        advice = "give TrainingArguments(use_cpu=True)" if job.device == "cpu" else "leave use_cpu= out"
        raise TrainerError(f"the Trainer would compute on {arguments.device}, but the job's workers on {job.device}: {advice}")
    if arguments.world_size > 1:
        raise TrainerError(
            f"the Trainer counts {arguments.world_size} processes by itself: start the script by `elastic run` or elastic.run, not by "
            "torchrun or accelerate launch"
        )


def check_resume(resume: Any, trial: Any, arguments: Any) -> None:
    """Raises TrainerError for a training that begins somewhere else than the job's."""
    if trial is not None:
        raise TrainerError("a trial of hyperparameter_search cannot be a part of a job: start a job for each trial")
    if isinstance(resume, str):
        raise TrainerError(
            f"train(resume_from_checkpoint={resume!r}): the job continues from the newest checkpoint in output_dir "
            f"({arguments.output_dir}) by itself. Give that directory as output_dir; for weights alone use from_pretrained"
        )


def check_callbacks(callbacks: Iterable[Any]) -> None:
    """Raises TrainerError for a callback that wants gradients."""
    for callback in callbacks:
        if overridden(callback, "on_pre_optimizer_step", transformers.TrainerCallback):
            raise TrainerError(
                f"{type(callback).__name__} has on_pre_optimizer_step, which looks at the step's gradient, but no worker has all of it. "
                "Use on_optimizer_step or on_step_end; trainer.steps.report.grad_norm is its norm"
            )
