"""What a Lightning Trainer can do but an elastic job has no place for, with the reason and the way out."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning, GradientAccumulationScheduler, ModelPruning, StochasticWeightAveraging, Timer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from elastic.errors import TrainerError
from elastic.integrations.turns import overridden

_HOOKS = {
    "on_before_optimizer_step": "it looks at the step's gradient, but no worker has all of it: in on_train_batch_end "
    "trainer.strategy.steps.report.grad_norm is its norm",
    "configure_gradient_clipping": "it clips the gradient of one micro-batch, before the step's is known: use "
    "Trainer(gradient_clip_val=...)",
    "on_before_batch_transfer": "batches of the loop have no contents, the runtime loads them: use collate_fn, or on_after_batch_transfer",
}
_CHANGES = {
    StochasticWeightAveraging: "it replaces the parameters, which are the job's. Average those of several checkpoints, which "
    "ElasticStrategy(checkpoint='runs/a', every=100) saves, after the job",
    ModelPruning: "it changes parameters between steps, which are the job's: prune the model before or after the job",
    BaseFinetuning: "it changes what is trained, which is fixed when the training begins. Give what it would freeze a parameter group of "
    "its own, whose learning rate and weight decay are 0 as long as it is frozen",
}


def check(trainer: Any, precision: Any) -> None:
    """Raises TrainerError for settings that cannot be exact, or have another place."""
    if trainer.num_devices != 1 or trainer.num_nodes != 1:
        raise TrainerError("Trainer(devices=..., num_nodes=...): the job has the workers, and each Trainer one device; give devices=1")
    if getattr(precision, "scaler", None) is not None:
        raise TrainerError("float16 needs a loss scale, which one worker cannot decide by its micro-batch: use precision='bf16-mixed'")
    if trainer.gradient_clip_val and str(getattr(trainer.gradient_clip_algorithm, "value", trainer.gradient_clip_algorithm)) == "value":
        raise TrainerError(
            "gradient_clip_algorithm='value' would clip gradients of one micro-batch: use 'norm', which clips the whole step's"
        )
    if trainer.limit_train_batches != 1.0 or trainer.overfit_batches:
        raise TrainerError(
            "limit_train_batches= and overfit_batches= choose batches of one process: use max_steps=, or Subset(dataset, ...)"
        )
    if trainer.reload_dataloaders_every_n_epochs:
        raise TrainerError("reload_dataloaders_every_n_epochs=: a job has one dataset from beginning to end; leave it out")
    for callback in trainer.callbacks:
        if isinstance(callback, Timer | GradientAccumulationScheduler):
            reason = "workers have different clocks" if isinstance(callback, Timer) else "an update has one batch size in the whole job"
            raise TrainerError(f"{type(callback).__name__} (or max_time=) cannot be used, as {reason}: use max_steps= or max_epochs=")
        for kind, advice in _CHANGES.items():
            if isinstance(callback, kind):
                raise TrainerError(f"{type(callback).__name__} cannot be used: {advice}")


def check_module(trainer: Any, module: Any) -> None:
    """Raises TrainerError for a module or callbacks with hooks that a step has no place for."""
    if not module.automatic_optimization:
        raise TrainerError(
            "automatic_optimization=False: the runtime takes each step by training_step. Write the steps as a plain loop, with job.prepare"
        )
    if len(trainer.optimizers) != 1:
        raise TrainerError(f"configure_optimizers returns {len(trainer.optimizers)} optimizers: give one, with several parameter groups")
    for name, advice in _HOOKS.items():
        if is_overridden(name, module):
            raise TrainerError(f"{type(module).__name__} has {name}: {advice}")
        for callback in trainer.callbacks:
            if hasattr(Callback, name) and overridden(callback, name, Callback):
                raise TrainerError(f"{type(callback).__name__} has {name}: {advice}")


def training_loader(given: object, before: object) -> DataLoader[Any]:
    """Returns the training's loader. Raises TrainerError if there are several, or it is no DataLoader with a length."""
    if before is not None:
        raise TrainerError("the training has several loaders: give one, over a dataset that has the samples of all")
    if not isinstance(given, DataLoader) or given.batch_size is None or not hasattr(given.dataset, "__len__"):
        raise TrainerError(
            f"the training's loader is a {type(given).__name__} without a batch size or length: give a DataLoader of a map-style dataset"
        )
    return given


def one_scheduler(configs: Any) -> Any:
    """Returns the scheduler of the one optimizer, None if there is none. Raises TrainerError if there are several."""
    if len(configs) > 1:
        raise TrainerError(f"configure_optimizers returns {len(configs)} schedulers: give one, such as SequentialLR or ChainedScheduler")
    return configs[0].scheduler if configs else None


def steps_of(trainer: Any, per_epoch: int) -> int:
    """Returns the number of steps of the training. Raises TrainerError if it has no end."""
    ends = [trainer.max_steps] if trainer.max_steps != -1 else []
    ends += [trainer.max_epochs * per_epoch] if trainer.max_epochs not in (None, -1) else []
    if not ends:
        raise TrainerError("max_epochs=-1: give max_steps= or max_epochs=, so that workers know the last step")
    return min(ends)


def check_resume(trainer: Any) -> None:
    """Raises TrainerError for a training that begins somewhere else than the job's."""
    if trainer.training or str(getattr(trainer.state.fn, "value", "")) == "fit":
        raise TrainerError(
            "fit(ckpt_path=...): a job continues from the newest checkpoint of ElasticStrategy(checkpoint='runs/a', every=100) by itself; "
            "for weights alone use load_from_checkpoint"
        )
