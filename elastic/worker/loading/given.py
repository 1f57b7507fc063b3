"""Reads what users give as data: a dataset, a DataLoader, of which the dataset and the settings are taken, or a function."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from elastic.engine.data import is_stream
from elastic.errors import TrainerError
from elastic.worker.loading.ahead import LoaderSettings

_log = logging.getLogger(__name__)
_WAYS = "shuffle=True or shuffle=False; to use a part of a dataset, give torch.utils.data.Subset(dataset, indices)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What the user has given as data: a dataset or function, how samples are joined, and whether they are shuffled."""

    data: Any
    batch_size: int
    collate: Callable[[list[Any]], Any] | None
    shuffles: bool
    processes: LoaderSettings | None = None


def check_length(data: Sized, samples: int) -> None:
    """Raises TrainerError if a dataset does not have this number of samples any more."""
    if (now := len(data)) != samples:
        raise TrainerError(
            f"the dataset has {now} samples when a loop begins, and {samples} when the training began: the order of all samples, and the "
            "length of epochs, follow from their number, also on workers that join later. Give all of them from the beginning; which one "
            "an index stands for may change between loops"
        )


def given(data: Any, batch_size: int | None, collate: Callable[[list[Any]], Any] | None) -> Given:
    """Reads what was given as data. Raises TrainerError if a DataLoader has what cannot be kept up, or the batch size is not known."""
    if isinstance(data, DataLoader):
        return _of_loader(data, batch_size, collate)
    if batch_size is None:
        raise TrainerError("batch_size= is missing: give the number of samples of an update, of all workers together")
    return Given(data=data, batch_size=batch_size, collate=collate, shuffles=True)


def _of_loader(loader: DataLoader[Any], batch_size: int | None, collate: Callable[[list[Any]], Any] | None) -> Given:
    if loader.batch_size is None:
        kind = "no batch_size" if loader.batch_sampler is None else f"a batch sampler of its own ({type(loader.batch_sampler).__name__})"
        raise TrainerError(f"the DataLoader has {kind}, so an update's samples would depend on who loads them: use batch_size= and {_WAYS}")
    size = loader.batch_size if batch_size is None else batch_size
    if is_stream(loader.dataset):
        if loader.num_workers:
            _log.warning("the DataLoader's num_workers=%d is not used: each worker reads all of an iterable dataset", loader.num_workers)
        return Given(data=loader.dataset, batch_size=size, collate=collate or loader.collate_fn, shuffles=False)
    sampler = loader.sampler
    if isinstance(sampler, DistributedSampler):
        raise TrainerError(
            "the DataLoader is already sharded by a DistributedSampler, but the runtime deals samples to workers itself, so that none is "
            "lost or repeated when workers die: leave sampler= out and give shuffle=True"
        )
    drawn = isinstance(sampler, RandomSampler) and (sampler.replacement or sampler.num_samples != len(sampler.data_source))  # pyright: ignore
    if type(sampler) not in (RandomSampler, SequentialSampler) or drawn:
        how = " with replacement=True or num_samples=" if drawn else ""
        raise TrainerError(f"the DataLoader has a {type(sampler).__name__}{how}, whose order other workers cannot repeat: use {_WAYS}")
    return Given(
        data=loader.dataset,
        batch_size=size,
        collate=collate or loader.collate_fn,
        shuffles=isinstance(sampler, RandomSampler),
        processes=LoaderSettings.of(loader),
    )
