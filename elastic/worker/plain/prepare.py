"""`job.prepare`: makes a plain loop's model, optimizer and data those of an elastic job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from elastic.engine.profile import LayerProfile
from elastic.errors import TrainerError
from elastic.worker.arguments import cut_batch
from elastic.worker.job import Job
from elastic.worker.plain.loader import Loader
from elastic.worker.plain.loop import Loop
from elastic.worker.plain.optimizer import PreparedOptimizer, PreparedScheduler
from elastic.worker.plain.refusals import check_model, check_optimizer, check_options, check_process
from elastic.worker.plain.source import Given, SizedStream, given, stream_of
from elastic.worker.plain.trainer import PlainTrainer


def prepare(
    job: Job,
    model: nn.Module,
    optimizer: Optimizer,
    data: Any,
    *,
    micro_batch_size: int,
    batch_size: int | None,
    scheduler: Any,
    steps: int | None,
    epochs: int | None,
    seed: int,
    collate: Callable[[list[Any]], Any] | None,
    options: dict[str, Any],
) -> tuple[Any, ...]:
    """See `Job.prepare`."""
    check_process()
    check_options(options)
    check_model(model)
    check_optimizer(optimizer, scheduler)
    what = given(data, batch_size, collate)
    cut_batch(what.batch_size, micro_batch_size, options.get("grains"))
    stream = stream_of(what, micro_batch_size, seed)
    ends = _ends(what, stream if isinstance(stream, SizedStream) else None, steps, epochs)
    own = {"batch_size": what.batch_size, "micro_batch_size": micro_batch_size, "seed": seed, "scheduler": scheduler}

    def make(body: Any, cost: LayerProfile, clip_norm: float | None) -> PlainTrainer:
        names = options.get("names", getattr(model, "_orig_mod", model))  # torch.compile puts it into another module
        return loader.made(PlainTrainer(body, optimizer, stream, cost, clip_norm=clip_norm, **own, **{**options, "names": names}))

    loop = Loop(job, model, optimizer, stream, make, seed)
    loader = Loader(loop, ends)
    job.clips, job.weighs = loop.clip, loop.weighted
    loader.optimizer = prepared = PreparedOptimizer(optimizer, loop)
    if scheduler is None:
        return model, prepared, loader
    return model, prepared, loader, PreparedScheduler(scheduler, loop)


def _ends(what: Given, sized: SizedStream | None, steps: int | None, epochs: int | None) -> Callable[[int], int]:
    """Returns a function from a pass's number to the number of steps that are taken in all when it ends.

    Batches may straddle epochs of the data, so the steps of the passes differ by one if the batch size does not divide the samples.
    """
    for name, value in (("steps", steps), ("epochs", epochs)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise TrainerError(f"{name}={value!r}: use a whole number of at least 1")
    if steps is not None and epochs is not None:
        raise TrainerError(f"steps={steps} and epochs={epochs} are both given: give one of them, for the length of a loop over the loader")
    if steps is not None:
        return lambda number: steps
    if sized is None:
        raise TrainerError("steps= is missing: a function, or data that is read in order, has no length. Give the number of steps in all")
    samples = len(sized)
    if epochs is None and samples < what.batch_size:
        raise TrainerError(
            f"the dataset has {samples} samples and an update {what.batch_size}, so some epochs would have no step: give steps= or epochs= "
            "for one loop, or a smaller batch_size"
        )
    return lambda number: (number + 1) * (epochs or 1) * samples // what.batch_size
