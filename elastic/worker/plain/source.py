"""The data of a plain loop: micro-batches of a dataset, of a DataLoader's dataset, or of a function."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import torch
from torch.utils._pytree import tree_map

from elastic.engine.data import Batch, DatasetBatches, Keyed, batches, on_device
from elastic.memory.tensors import contiguous
from elastic.worker.loading.ahead import LoadedAhead, ahead
from elastic.worker.loading.given import Given, check_length


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

    def begin_pass(self) -> None:
        """Notes that a pass over the data begins: code before it may have changed the dataset's settings.

        Raises TrainerError if it has another length.
        """
        if isinstance(self._load, LoadedAhead):
            self._load.renew()

    def load(self, step: int, micro_batch: int) -> Any:
        """Loads a micro-batch to where layers compute. Its tensors are contiguous and aligned, as kernels' bits may depend on that."""
        return on_device(tree_map(lambda leaf: contiguous(leaf) if isinstance(leaf, torch.Tensor) else leaf, self._load(step, micro_batch)))

    def taken(self, step: int, micro_batch: int) -> Any:
        """Returns a loaded micro-batch, and forgets it."""
        return self._loaded.pop((step, micro_batch))


class SizedStream(Stream):
    """The same of a dataset."""

    def __init__(self, load: Batch, dataset: Sized) -> None:
        super().__init__(load)
        self._dataset, self._samples = dataset, len(dataset)

    def begin_pass(self) -> None:
        check_length(self._dataset, self._samples)
        super().begin_pass()

    def __len__(self) -> int:
        return self._samples


def stream_of(what: Given, micro_batch_size: int, seed: int) -> Stream:
    """Returns the micro-batches of what was given.

    Raises:
        TrainerError: for data that can only be read once, or that is empty; or that cannot be sent to the processes that load it.
    """
    sizes = {"batch_size": what.batch_size, "micro_batch_size": micro_batch_size}
    load = batches(what.data, **sizes, seed=seed, collate=what.collate, shuffles=what.shuffles)
    if not isinstance(load, DatasetBatches):
        return Stream(load)
    return SizedStream(ahead(load, what.processes), what.data)
