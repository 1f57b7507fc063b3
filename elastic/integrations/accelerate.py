"""An `Accelerator` of Hugging Face Accelerate whose loop trains as an elastic job.

    from elastic.integrations.accelerate import ElasticAccelerator  # instead of accelerate.Accelerator

The script's loop is a plain loop (`job.prepare`): its body runs once for each micro-batch that this worker has of a step. An update's batch
is `gradient_accumulation_steps` batches of the loader, of all workers together. To the script it looks like one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from elastic.errors import TrainerError
from elastic.integrations import accelerate_refusals as refusals
from elastic.worker.job import Job, current_job
from elastic.worker.plain.loader import Loader
from elastic.worker.plain.loop import Place


class Batches:
    """The loader that `prepare` returns: `job.prepare`'s, which it has the attributes of, with the length of the script's own loader."""

    def __init__(self, loader: Loader, own: DataLoader[Any], accumulated: int) -> None:
        self._loader, self._accumulated = loader, accumulated
        self.dataset, self.batch_size = own.dataset, own.batch_size

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)

    def __len__(self) -> int:
        """The batches of the next pass, of all workers together."""
        return len(self._loader) * self._accumulated

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_loader"], name)

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: steps key the order of samples."""


class ElasticAccelerator(Accelerator):
    """`accelerate.Accelerator` on all workers of the running job.

    Args:
        micro_batch_size: samples of one body; by default the batch size of the training's loader.
        prepare_options: further arguments of `job.prepare`, such as `{"checkpoint": "runs/a", "every": 100}`.
        given, named: those of `accelerate.Accelerator`.

    Raises:
        TrainerError: for what cannot be exact or has another place in a job; the message names the remedy.
        NotInJob: outside of a job.
    """

    def __init__(
        self, *given: Any, micro_batch_size: int | None = None, prepare_options: dict[str, Any] | None = None, **named: Any
    ) -> None:
        self.job: Job = current_job()
        self.loader: Batches | None = None
        self._micro_batch_size, self._options = micro_batch_size, prepare_options or {}
        self._registered: list[Any] = []
        if self.job.device == "cpu":
            named.setdefault("cpu", True)
        super().__init__(*given, **named)
        refusals.check(self, self.job)

    # Before the loop

    def prepare(self, *given: Any, device_placement: Any = None) -> Any:
        """Prepares model, optimizer and the training's loader, which is the first one, in one call; schedulers and others with them.

        A call without an optimizer prepares for evaluation, which every worker does with all the data.
        """
        optimizers = [each for each in given if isinstance(each, Optimizer)]
        if not optimizers:
            refusals.check_without_optimizer(given)
            return super().prepare(*given, device_placement=device_placement)
        model, optimizer, loader, scheduler = refusals.one_of_each(given, optimizers, self.loader is not None)
        done = self._prepare_training(self.prepare_model(model), optimizer, loader, scheduler)
        return tuple(done[id(each)] if id(each) in done else super(ElasticAccelerator, self).prepare(each) for each in given)

    def _prepare_training(self, model: nn.Module, optimizer: Optimizer, loader: DataLoader[Any], scheduler: Any) -> dict[int, Any]:
        """Returns what stands for each of the given objects, by the object's id."""
        each = loader.batch_size
        if each is None:
            raise TrainerError("the DataLoader has no batch_size, so it is not known how many samples an update has: give it batch_size=")
        sizes = {"micro_batch_size": self._micro_batch_size or each, "batch_size": each * self.gradient_accumulation_steps}
        out = self.job.prepare(model, optimizer, loader, **sizes, scheduler=scheduler, **self._options)
        self.loader = Batches(out[2], loader, self.gradient_accumulation_steps)
        self.loader.register_for_checkpointing(*self._registered)
        found = {id(model): model, id(optimizer): out[1], id(loader): self.loader}
        return found if scheduler is None else {**found, id(scheduler): out[3]}

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Objects that bodies change where `loader.report` is not None: workers that join and checkpoints get their states."""
        if self.loader is None:
            self._registered += objects
        else:
            self.loader.register_for_checkpointing(*objects)

    # In the body

    @contextmanager
    def accumulate(self, *models: Any) -> Iterator[None]:
        """Does nothing: the runtime adds up the gradients of a step's micro-batches."""
        yield

    def backward(self, loss: torch.Tensor, **options: Any) -> None:
        """The loss is not divided by `gradient_accumulation_steps`: a step's gradient is the mean over its micro-batches."""
        loss.backward(**options)

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> None:
        """Clips the gradient of the whole step. Its norm is known when the step is committed: `loader.report.grad_norm`."""
        if norm_type != 2:
            raise TrainerError(
                f"clip_grad_norm_(norm_type={norm_type}): the norm of a step's gradient is the L2 norm; leave norm_type= out"
            )
        self.job.clip_grad_norm_(max_norm)

    @property
    def sync_gradients(self) -> bool:
        """Whether the body ends a step; True also before `optimizer.step()`, where it is not known."""
        return self._place is not Place.TAIL

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether the step that the body has ended was skipped for values that are not finite."""
        report = None if self.loader is None else self.loader.report
        return report is not None and report.skipped is not None

    def unscale_gradients(self, optimizer: Any = None) -> None:
        """Does nothing: there is no loss scale."""

    # What one process does for all

    @property
    def is_main_process(self) -> bool:
        """Whether this worker is the job's leader. Another one becomes it when it dies."""
        return self.job.leader

    @property
    def is_local_main_process(self) -> bool:
        """See `is_main_process`."""
        return self.job.leader

    @property
    def is_last_process(self) -> bool:
        """See `is_main_process`."""
        return self.job.leader

    def on_main_process(self, function: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """Returns a function that does nothing but on the leader."""
        assert function is not None  # as a decorator

        @wraps(function)
        def on_leader(*given: Any, **named: Any) -> Any:
            return function(*given, **named) if self.job.leader else None

        return on_leader

    on_local_main_process = on_last_process = on_main_process

    def print(self, *given: Any, **named: Any) -> None:
        """Prints on the leader."""
        if self.job.leader:
            print(*given, **named)

    def save(self, *given: Any, **named: Any) -> None:
        """`Accelerator.save`, on the leader."""
        if self.job.leader:
            super().save(*given, **named)

    def save_model(self, *given: Any, **named: Any) -> None:
        """`Accelerator.save_model`, on the leader."""
        if self.job.leader:
            super().save_model(*given, **named)

    def save_state(self, output_dir: str | None = None, *_: Any, **named: Any) -> None:
        """Saves the training at once, in the directory of `prepare_options`. Every worker calls it, where `loader.report` is not None."""
        refusals.check_save(output_dir, self._options.get("checkpoint"))
        assert self.loader is not None  # else there is no directory
        self.loader.save()

    # What is refused

    @property
    def _place(self) -> Place:
        return Place.OUTSIDE if self.loader is None else self.loader.loop.place

    def gather(self, tensor: Any) -> Any:
        """Returns what it is given: in evaluation each worker has all of it. Raises TrainerError in the middle of a step."""
        refusals.check_gather(self._place)
        return super().gather(tensor)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """See `gather`."""
        refusals.check_gather(self._place)
        return super().gather_for_metrics(input_data, use_gather_object)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """See `gather`."""
        refusals.check_gather(self._place)
        return super().reduce(tensor, reduction, scale)

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> NoReturn:
        """Raises TrainerError."""
        raise TrainerError("clip_grad_value_() would clip the gradient of one micro-batch, before the step's is known: use clip_grad_norm_")

    def load_state(self, *_: Any, **named: Any) -> NoReturn:
        """Raises TrainerError."""
        raise TrainerError("load_state(): a job continues from the newest checkpoint in its directory by itself; leave the call out")

    def skip_first_batches(self, *_: Any, **named: Any) -> NoReturn:
        """Raises TrainerError."""
        raise TrainerError("skip_first_batches(): a job that continues gives the samples of its next step by itself; leave the call out")

    def set_trigger(self) -> NoReturn:
        """Raises TrainerError."""
        raise TrainerError(
            "set_trigger() on one worker cannot stop all after the same step: leave the loop where loader.report is not None, by a value "
            "that all have, such as loader.report.loss"
        )
