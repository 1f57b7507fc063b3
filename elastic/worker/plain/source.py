"""The data of a plain loop: micro-batches of a dataset, of a DataLoader's dataset, or of a function."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from elastic.engine.data import Batch, DatasetBatches, Keyed, batches, is_stream, on_device
from elastic.errors import TrainerError
from elastic.memory.tensors import contiguous

_log = logging.getLogger(__name__)
_WAYS = "shuffle=True or shuffle=False; to use a part of a dataset, give torch.utils.data.Subset(dataset, indices)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What the user has given as data: a dataset or function, how samples are joined, and whether they are shuffled."""

    data: Any
    batch_size: int
    collate: Callable[[list[Any]], Any] | None
    shuffles: bool


class Stream:
    """The micro-batches, as the engine loads them: each with its key, by which the loop's body finds it (`taken`)."""

    def __init__(self, load: Batch) -> None:
        self._load = load
        self._loaded: dict[tuple[int, int], Any] = {}
        self.updates = 1  # that are made with a batch, each of which is a step to the engine

    def __call__(self, step: int, micro_batch: int) -> Keyed:
        contents = self.load(step // self.updates, micro_batch)
        for key in [key for key in self._loaded if key[0] != step]:  # of a step that was given up
            del self._loaded[key]
        self._loaded[step, micro_batch] = contents
        return Keyed((torch.tensor([step, micro_batch]), contents))

    @property
    def source(self) -> Batch:
        """See `elastic.engine.data.stream_in`."""
        return self._load

    def load(self, step: int, micro_batch: int) -> Any:
        """Loads a micro-batch to where layers compute. Its tensors are contiguous and aligned, as kernels' bits may depend on that."""
        return on_device(tree_map(lambda leaf: contiguous(leaf) if isinstance(leaf, torch.Tensor) else leaf, self._load(step, micro_batch)))

    def taken(self, step: int, micro_batch: int) -> Any:
        """Returns a loaded micro-batch, and forgets it."""
        return self._loaded.pop((step, micro_batch))


class SizedStream(Stream):
    """The same of a dataset."""

    def __init__(self, load: Batch, samples: int) -> None:
        super().__init__(load)
        self._samples = samples

    def __len__(self) -> int:
        return self._samples


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
    if loader.num_workers:
        _log.warning("the DataLoader's num_workers=%d is not used: each worker of the job loads its own samples", loader.num_workers)
    size = loader.batch_size if batch_size is None else batch_size
    if is_stream(loader.dataset):
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
    return Given(data=loader.dataset, batch_size=size, collate=collate or loader.collate_fn, shuffles=isinstance(sampler, RandomSampler))


def stream_of(what: Given, micro_batch_size: int, seed: int) -> Stream:
    """Returns the micro-batches of what was given. Raises TrainerError for data that can only be read once, or that is empty."""
    load = batches(what.data, batch_size=what.batch_size, micro_batch_size=micro_batch_size, seed=seed, collate=what.collate)
    if not isinstance(load, DatasetBatches):
        return Stream(load)
    return SizedStream(replace(load, shuffles=what.shuffles), len(what.data))
