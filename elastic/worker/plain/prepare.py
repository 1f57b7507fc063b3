"""`job.prepare`: makes a plain loop's model, optimizer and data those of an elastic job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from elastic.engine.profile import LayerProfile
from elastic.errors import TrainerError
from elastic.worker.arguments import cut_batch
from elastic.worker.job import Job
from elastic.worker.loading.given import Given, given
from elastic.worker.plain.arguments import Sorted
from elastic.worker.plain.loader import Loader
from elastic.worker.plain.loop import Loop
from elastic.worker.plain.optimizer import PreparedOptimizer, PreparedScheduler
from elastic.worker.plain.passes import Passes
from elastic.worker.plain.refusals import check_module, check_optimizers, check_options
from elastic.worker.plain.several import Schedulers, as_one, parameters_of
from elastic.worker.plain.source import SizedStream, stream_of
from elastic.worker.plain.trainer import PlainTrainer
from elastic.worker.refusals import check_process


def prepare(
    job: Job,
    found: Sorted,
    *,
    micro_batch_size: int,
    batch_size: int | None,
    steps: int | None,
    epochs: int | None,
    seed: int,
    collate: Callable[[list[Any]], Any] | None,
    options: dict[str, Any],
) -> tuple[Any, ...]:
    """See `Job.prepare`."""
    check_process()
    check_options(options)
    for each in found.models:
        check_module(each)
    check_optimizers(found.optimizers, found.schedulers)
    what = given(found.data, batch_size, collate)
    cut_batch(what.batch_size, micro_batch_size, options.get("grains"))
    stream = stream_of(what, micro_batch_size, seed)
    passes = Passes(_ends(what, stream if isinstance(stream, SizedStream) else None, steps, epochs), whole=steps is None)
    parameters = [parameters_of(each) for each in found.optimizers]
    optimizer = as_one(found.optimizers)
    scheduler = found.schedulers[0] if len(found.schedulers) == 1 and len(found.optimizers) == 1 else None
    if found.schedulers and scheduler is None:
        scheduler = Schedulers(found.schedulers, optimizer)
    own = {"batch_size": what.batch_size, "micro_batch_size": micro_batch_size, "seed": seed, "scheduler": scheduler}

    def make(body: Any, cost: LayerProfile, clip_norms: Sequence[float | None]) -> PlainTrainer:
        named = [getattr(each, "_orig_mod", each) for each in found.models]  # torch.compile puts it into another module
        names = options.get("names", named[0] if len(named) == 1 else nn.ModuleList(named))
        return loader.made(PlainTrainer(body, optimizer, stream, cost, clip_norms, **own, **{**options, "names": names}))

    model = found.models[0] if len(found.models) == 1 else nn.ModuleList(found.models)
    loop = Loop(job, model, optimizer, parameters, stream, make, seed, exact=options.get("exact", True))
    loader = Loader(loop, passes, found.data, batch_size=what.batch_size, saves=options.get("checkpoint") is not None)
    job.clips, job.weighs = loop.clip, loop.weighted
    loader.optimizers = [PreparedOptimizer(each, loop, number) for number, each in enumerate(found.optimizers)]
    prepared = {id(each): ours for each, ours in zip(found.optimizers, loader.optimizers, strict=True)}
    prepared |= {id(each): PreparedScheduler(each, loop) for each in found.schedulers}
    return found.returned(lambda each: loader if each is found.data else prepared.get(id(each), each))


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
