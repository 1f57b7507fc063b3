"""A strategy of Lightning that trains as an elastic job.

    from elastic.integrations.lightning import ElasticStrategy

    Trainer(strategy=ElasticStrategy(), accumulate_grad_batches=8, ...)

An update's batch is `accumulate_grad_batches` batches of the loader, of all workers together. A batch of the Trainer's loop is a whole
step: `training_step` runs inside of its `optimizer_step`, once for each micro-batch that this worker has. Between two steps each worker has
all parameters, so validation, callbacks and schedulers work as in one process, on every worker alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from elastic.errors import TrainerError
from elastic.integrations import lightning_refusals as refusals
from elastic.integrations.lightning_logs import StepLogs
from elastic.integrations.lightning_progress import CallbackStates, fast_forward
from elastic.integrations.turns import turns
from elastic.worker.job import Job, current_job
from elastic.worker.plain.loader import Loader
from elastic.worker.plain.whole_steps import WholeSteps


class ElasticStrategy(SingleDeviceStrategy):
    """Trains on all workers of the running job; every worker makes the same Trainer and calls `fit`.

    Args:
        micro_batch_size: samples of one `training_step`; by default the batch size of the training's loader.
        prepare_options: further arguments of `job.prepare`, such as `checkpoint="runs/a"` and `every=100`.

    Raises:
        TrainerError: for what cannot be exact or has another place in a job; the message names the remedy.
        NotInJob: outside of a job.
    """

    strategy_name = "elastic"

    def __init__(self, micro_batch_size: int | None = None, **prepare_options: Any) -> None:
        self.job: Job = current_job()
        super().__init__(device=self.job.device)
        self._micro_batch_size, self._options = micro_batch_size, prepare_options
        self._data: DataLoader[Any] | None = None
        self._accumulated = 1
        self._behind = False  # whether the loop's own closure runs, behind a step
        self.loader: Loader
        self.steps: WholeSteps

    # Before the training

    def setup_environment(self) -> None:
        super().setup_environment()
        trainer = self._trainer
        refusals.check(trainer, self.precision_plugin)
        self._follow_leader()
        self._accumulated, trainer.accumulate_grad_batches = trainer.accumulate_grad_batches, 1  # of the loop's turns

    def process_dataloader(self, dataloader: object) -> object:
        """Takes the training's loader, and returns what the loop iterates over: as many turns as an epoch has steps."""
        if not self._trainer.training:
            return dataloader
        self._data = refusals.training_loader(dataloader, self._data)
        batches, samples = len(self._data), len(self._data.dataset)  # type: ignore[arg-type]
        return turns(-(-batches // self._accumulated), samples)

    def on_train_start(self) -> None:
        """Prepares model, optimizer and data, tries a micro-batch out, joins the job, and brings the loop to the job's step."""
        trainer, module = self._trainer, self.lightning_module
        refusals.check_module(trainer, module)
        assert self._data is not None  # checked by Lightning
        assert self._data.batch_size is not None
        each, per_epoch = self._data.batch_size, int(trainer.fit_loop.max_batches)
        sizes = {"micro_batch_size": self._micro_batch_size or each, "batch_size": each * self._accumulated}
        given = {"steps": refusals.steps_of(trainer, per_epoch), "seed": 0, **self._options}
        scheduler = refusals.one_scheduler(self.lr_scheduler_configs)
        out = self.job.prepare(self.model, self.optimizers[0], self._data, **sizes, scheduler=scheduler, **given)
        self.loader = out[2]
        self.logs = StepLogs(trainer, each * self._accumulated)
        self.loader.register_for_checkpointing(self.logs, *CallbackStates.of(trainer))
        self.steps = WholeSteps(self.loader, out[1], self._body)
        fast_forward(trainer, self.steps.begin(), per_epoch)
        self._follow_leader()

    # A step

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Takes a whole step; then the loop's closure, which gets the step's loss for the one it would compute."""
        report = self.steps.take()
        if report.step != self._trainer.global_step:
            raise TrainerError(f"the Trainer's loop is at step {self._trainer.global_step}, but the job at step {report.step}")
        self._follow_leader()
        if report.stopped:
            self._trainer.should_stop = True
        self._behind = True
        try:
            return closure()
        finally:
            self._behind = False

    def _body(self, batch: Any) -> None:
        """Runs `training_step` and backward on a micro-batch."""
        trainer, module = self._trainer, self.lightning_module
        assert module is not None
        batch = self.batch_to_device(self.precision_plugin.convert_input(batch))
        given = trainer.fit_loop.epoch_loop._build_kwargs({}, batch, max(trainer.fit_loop.batch_idx, 0))  # type: ignore[arg-type]
        with self.logs.kept(module) as logged, torch.enable_grad():
            output = super().training_step(*given.values())
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if loss is None:
            raise TrainerError(
                "training_step returned no loss: every micro-batch counts in its step. To leave one out, return its loss * 0"
            )
        self.logs.learn(logged, loss)
        super().backward(loss, self.optimizers[0])
        if trainer.gradient_clip_val:
            self.job.clip_grad_norm_(float(trainer.gradient_clip_val))

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Logs the step's loss, under the names that `training_step` logs its own by, and returns it."""
        report = self.steps.report
        assert self._behind
        assert report is not None
        loss = torch.tensor(report.loss, device=self.root_device)
        self.logs.log(self.lightning_module, loss)
        return loss

    def backward(self, closure_loss: torch.Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Does nothing: the step is complete."""
        return closure_loss

    def on_train_end(self) -> None:
        """Ends the loop of the job."""
        self.steps.end()

    # What one process does for all

    @property
    def _trainer(self) -> Any:
        assert self.lightning_module is not None  # connected before
        return self.lightning_module.trainer

    @property
    def is_global_zero(self) -> bool:
        """Whether this worker is the job's leader. Another one becomes it when it dies."""
        return self.job.leader

    def _follow_leader(self) -> None:
        rank_zero_only.rank = 0 if self.job.leader else 1

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Nothing: each worker has a part of it. `ElasticStrategy(checkpoint=...)` saves all of them."""
        return {}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads a checkpoint for validation and tests. Raises TrainerError for a training."""
        refusals.check_resume(self._trainer)
        return super().load_checkpoint(checkpoint_path, weights_only)

    def teardown(self) -> None:
        """Leaves parameters where they are: the job may still ask for them."""
        self._trainer.accumulate_grad_batches = self._accumulated
        self.precision_plugin.teardown()
        if self.accelerator is not None:
            self.accelerator.teardown()
        self.checkpoint_io.teardown()

    def digest(self) -> str | None:
        """The hex SHA-256 of all parameters and buffers, on the leader. Every worker calls it after `fit`."""
        return self.loader.digest()
