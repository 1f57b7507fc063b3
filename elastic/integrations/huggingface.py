"""A `Trainer` of transformers that trains as an elastic job.

    from elastic.integrations.huggingface import ElasticTrainer  # instead of transformers.Trainer

The update's batch is `per_device_train_batch_size * gradient_accumulation_steps` samples, of all workers together. A turn of the Trainer's
loop is a whole step; `training_step` runs inside of it, once for each micro-batch that this worker has. Between two turns each worker has
all parameters, so evaluation, callbacks and schedulers work as in one process, on every worker alike.
"""

from __future__ import annotations

import copy
import math
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from torch.utils.data import DataLoader

from elastic.checkpoint.commit import final_name
from elastic.checkpoint.directory import named_step
from elastic.errors import TrainerError
from elastic.integrations.huggingface_refusals import check_arguments, check_callbacks, check_resume
from elastic.integrations.huggingface_state import LoopState
from elastic.integrations.turns import StepOptimizer, turns
from elastic.worker.job import Job, current_job
from elastic.worker.plain.loader import Loader
from elastic.worker.plain.whole_steps import WholeSteps


class _StepAccelerator(Accelerator):
    """What the Trainer's loop asks of Accelerate, answered by the step that was taken."""

    trainer: ElasticTrainer

    def backward(self, loss: torch.Tensor, **options: Any) -> None:
        self.trainer.backward(loss)

    def clip_grad_norm_(self, *_: Any, **options: Any) -> torch.Tensor:
        report = self.trainer.steps.report
        assert report is not None  # the loop clips behind training_step
        return torch.tensor(report.grad_norm)

    def prepare(self, *given: Any, **options: Any) -> Any:
        done = [self._one(each, **options) for each in given]
        return done[0] if len(done) == 1 else tuple(done)

    def _one(self, given: Any, **options: Any) -> Any:
        own = isinstance(given, torch.optim.Optimizer) or (isinstance(given, DataLoader) and self.trainer.loads_training_data)
        return given if own else super().prepare(given, **options)

    @property
    def optimizer_step_was_skipped(self) -> bool:
        report = self.trainer.steps.report
        return report is not None and report.skipped is not None


class _Begins(transformers.TrainerCallback):
    """Joins the job before any other callback hears that the training begins."""

    def __init__(self, trainer: ElasticTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.join(state)


class ElasticTrainer(transformers.Trainer):
    """`transformers.Trainer` on all workers of the running job; every worker makes the same one and calls `train()`.

    Args:
        micro_batch_size: samples of one `training_step`; by default `per_device_train_batch_size`. It decides bits, and an update is
            divided among workers in such pieces.
        prepare_options: further arguments of `job.prepare`, such as `{"on_nonfinite": "skip"}`.
        given, named: those of `transformers.Trainer`.

    Raises:
        TrainerError: for what cannot be exact or has another place in a job; the message names the remedy.
        NotInJob: outside of a job.
    """

    def __init__(
        self, *given: Any, micro_batch_size: int | None = None, prepare_options: dict[str, Any] | None = None, **named: Any
    ) -> None:
        if not hasattr(transformers.Trainer, "_run_epoch"):
            raise TrainerError(
                f"transformers {transformers.__version__} is too old: ElasticTrainer needs Trainer._run_epoch: install 5.23 or newer"
            )
        self.job: Job = current_job()
        self.loads_training_data = False
        self._weight: Any = None
        self._digest: str | None = None  # of the last step, once the best parameters are loaded
        super().__init__(*given, **named)
        self._options = prepare_options or {}
        self._micro_batch_size = self.args.per_device_train_batch_size if micro_batch_size is None else micro_batch_size
        self._batch_size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        self.args = self._own_arguments()
        self.accelerator.__class__ = _StepAccelerator
        self.accelerator.trainer = self  # type: ignore[attr-defined]
        self.callback_handler.callbacks.insert(0, _Begins(self))
        if self.args.disable_tqdm is False:
            self.callback_handler.pop_callback(transformers.ProgressCallback)  # the job has a bar of its own
            self.callback_handler.add_callback(transformers.PrinterCallback)
            self.args.disable_tqdm = True
        self.training_step = self._step  # type: ignore[method-assign]  # the class's own is that of a micro-batch
        self.loader: Loader
        self.steps: WholeSteps

    def _own_arguments(self) -> Any:
        check_arguments(self.args, self.job)
        own = copy.copy(self.args)
        own.gradient_accumulation_steps = 1  # of the loop's turns
        return own

    # What the loop asks for before the training

    @contextmanager
    def _training_data(self) -> Any:
        self.loads_training_data = True
        try:
            yield
        finally:
            self.loads_training_data = False

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: list[str] | None = None) -> Any:
        """`Trainer.train`. A job that saves (`save_strategy`) continues from the newest checkpoint in `output_dir` by itself."""
        check_resume(resume_from_checkpoint, trial, self.args)
        check_callbacks(self.callback_handler.callbacks)
        return super().train(None, trial, ignore_keys_for_eval)

    def _inner_training_loop(self, *given: Any, **named: Any) -> Any:
        with self._training_data():
            self._data = self.get_train_dataloader()
        self.get_train_dataloader = self._turns  # type: ignore[method-assign]
        try:
            return super()._inner_training_loop(*given, **named)
        finally:
            del self.get_train_dataloader

    def _turns(self) -> DataLoader[Any]:
        """Returns what the loop iterates over: as many turns as an epoch has steps."""
        try:
            samples = len(self._data.dataset)  # type: ignore[arg-type]
        except TypeError:
            return turns(self.args.max_steps, self.args.max_steps * self._batch_size)
        each = self.args.per_device_train_batch_size
        loaded = samples // each if self.args.dataloader_drop_last else math.ceil(samples / each)
        return turns(max(math.ceil(loaded / (self._batch_size // each)), 1), samples)

    def join(self, state: Any) -> None:
        """Prepares model, optimizer and data, tries a micro-batch out, and joins the job. `state` gets the number of steps taken so far."""
        assert self.optimizer is not None  # made by the loop
        saves = str(getattr(self.args.save_strategy, "value", self.args.save_strategy)) != "no"
        where = {"checkpoint": self.args.output_dir, "keep": self.args.save_total_limit} if saves else {}
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        options = {"steps": state.max_steps, "seed": seed, "scheduler": self.lr_scheduler, **where, **self._options}
        sizes = {"micro_batch_size": self._micro_batch_size, "batch_size": self._batch_size}
        _, optimizer, self.loader, _ = self.job.prepare(self.model, self.optimizer, self._data, **sizes, **options)
        self.loader.register_for_checkpointing(LoopState(self))
        self.loader.keep_too(self._best)
        self.optimizer = self.callback_handler.optimizer = StepOptimizer(optimizer)
        self.steps = WholeSteps(self.loader, optimizer, self._body)
        state.global_step = self.steps.begin()
        self._follow_leader()

    # A step

    def _step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Takes a whole step, in the place of `training_step`; returns its loss."""
        report = self.steps.take()
        if report.step != self.state.global_step:
            where = f"the Trainer's loop is at step {self.state.global_step}, but the job at step {report.step}"
            raise TrainerError(f"{where}: leave state.global_step as it is in callbacks")
        self._follow_leader()
        if report.stopped:
            self.control.should_training_stop = True
        return torch.tensor(report.loss, device=self.args.device)

    def _body(self, inputs: dict[str, Any]) -> None:
        """Runs `training_step` on a micro-batch."""
        self._sample = inputs
        items = self._get_num_items_in_batch([inputs], self.args.device)
        self._weight = items if self._divides_by_items() else None
        self.current_gradient_accumulation_steps = 1
        type(self).training_step(self, self.model, inputs, items)  # type: ignore[arg-type]
        if self.args.max_grad_norm > 0:
            self.job.clip_grad_norm_(self.args.max_grad_norm)

    def _divides_by_items(self) -> bool:
        """Whether the loss of a micro-batch is a sum, divided by `num_items_in_batch`: as `Trainer.training_step` decides it."""
        if (scaled := getattr(self, "loss_is_scaled_for_ga", None)) is not None:
            return scaled
        return self.model_accepts_loss_kwargs or self.compute_loss_func is not None

    def backward(self, loss: torch.Tensor) -> None:
        """The backward of a micro-batch's loss, which is a mean over its tokens if the Trainer counts them."""
        (loss if self._weight is None else self.job.weighted(loss, self._weight)).backward()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Those of a step, estimated by a micro-batch."""
        return super().floating_point_ops(inputs or self._sample) * (1 if inputs else self._batch_size // self._micro_batch_size)

    # What the loop does behind a step

    def _run_epoch(self, *, epoch: int, num_update_steps_per_epoch: int, **named: Any) -> None:
        """Runs what is left of an epoch where this worker joins."""
        over = self.state.global_step - epoch * num_update_steps_per_epoch
        if over >= num_update_steps_per_epoch or self.state.global_step >= self.state.max_steps:
            return
        if over > 0:
            skipped = {"epochs_trained": epoch, "steps_trained_in_current_epoch": over, "resume_from_checkpoint": "the job"}
            named = {**named, **skipped}
        super()._run_epoch(epoch=epoch, num_update_steps_per_epoch=num_update_steps_per_epoch, **named)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Leaves generators as they are: steps key them."""

    def _finalize_training(self, *given: Any, **named: Any) -> Any:
        self.steps.end()
        return super()._finalize_training(*given, **named)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Saves the training to `output_dir` as the runtime does: weights, and optimizer state, each worker its own part."""
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = f"{self.args.output_dir}/{final_name(self.state.global_step)}"
        self.loader.save()

    def _best(self) -> list[int]:
        """Returns the number of steps of the best checkpoint, if there is one."""
        step = named_step((self.state.best_model_checkpoint or "").rpartition("/")[2])
        return [] if step is None else [step]

    def _load_best_model(self) -> None:
        """Gives the model the parameters of the best checkpoint. The job's are those after the last step, which are saved before."""
        self.loader.save()
        self._digest = self.loader.digest()
        for step in self._best():
            self.loader.loop.trainer("load_best_model_at_end").show_saved(step)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`Trainer.save_model`, on the leader."""
        if self.job.leader:
            super().save_model(output_dir, _internal_call)

    def digest(self) -> str | None:
        """The hex SHA-256 of all parameters and buffers after the last step. Every worker calls it."""
        return self.loader.digest() if self._digest is None else self._digest

    def is_world_process_zero(self) -> bool:
        """Whether this worker is the job's leader. Another one becomes it when it dies."""
        return self.job.leader

    def is_local_process_zero(self) -> bool:
        """See `is_world_process_zero`."""
        return self.job.leader

    def _follow_leader(self) -> None:
        self.state.is_world_process_zero = self.state.is_local_process_zero = self.job.leader
