"""Micro-batches from a dataset or a function `batch(step, micro_batch)`; they do not depend on the worker that loads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset, default_collate

from elastic.engine import randomness
from elastic.engine.bit_equality import plain, same
from elastic.engine.sampler import samples
from elastic.engine.streaming import StreamBatches
from elastic.errors import TrainerError
from elastic.memory import device

Batch = Callable[[int, int], Any]


def is_stream(data: object) -> bool:
    """Returns whether data can only be read in order."""
    return isinstance(data, IterableDataset) or (isinstance(data, Iterable) and not hasattr(data, "__getitem__"))


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetBatches:
    """Micro-batches of a map-style dataset, shuffled unless `shuffles` is False.

    Every sample is drawn, transforms included, under generators keyed by (seed, sample index, data epoch).
    """

    dataset: Any
    batch_size: int
    micro_batch_size: int
    seed: int
    collate: Callable[[list[Any]], Any] = default_collate
    shuffles: bool = True

    def __call__(self, step: int, micro_batch: int) -> Any:
        first = micro_batch * self.micro_batch_size
        drawn, positions = [], range(first, first + self.micro_batch_size)
        for sample in samples(self.seed, step, self.batch_size, len(self.dataset), positions, shuffled=self.shuffles):
            randomness.seed_all(self.seed, "sample", sample.index, sample.data_epoch)
            drawn.append(self.dataset[sample.index])
        return self.collate(drawn)


def batches(
    data: Any,
    *,
    batch_size: int,
    micro_batch_size: int,
    seed: int,
    collate: Callable[[list[Any]], Any] | None,
    shuffles: bool = True,
) -> Batch:
    """Returns the function (step, micro_batch) -> micro-batch; `shuffles` is for map-style datasets.

    Raises:
        TrainerError: for data that can only be read once, or that is empty.
    """
    if is_stream(data):
        join = collate or default_collate
        return StreamBatches(data, batch_size=batch_size, micro_batch_size=micro_batch_size, seed=seed, collate=join)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        if len(data) == 0:
            raise TrainerError("the dataset is empty")
        return DatasetBatches(
            dataset=data,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            seed=seed,
            collate=collate or default_collate,
            shuffles=shuffles,
        )
    if callable(data):
        return data
    raise TrainerError(f"data must be a dataset or a function batch(step, micro_batch), not {type(data).__name__}")


def check_repeats(batch: Batch) -> None:
    """Loads the first micro-batch twice. Raises TrainerError if its values differ: then they would depend on who loads what, and when.

    Values that are no plain data, such as objects of a user's own, are not compared.
    """
    first, second = batch(0, 0), batch(0, 0)
    if plain(first) and not same(first, second):
        raise TrainerError(
            "the first micro-batch was loaded twice, and its values differ: the dataset or collate draws from a generator of its own, or "
            "counts its calls. Workers load different micro-batches, and some load one again, so this cannot be exact. Draw from the "
            "global generators of torch, NumPy and Python, which are keyed by sample; values of a function batch(step, micro_batch) "
            "must depend on these alone. exact=False allows it"
        )


def stream_in(batch: Batch) -> StreamBatches | None:
    """Returns the data that is read in order, if micro-batches come from such data; `source` of another function names its own source."""
    while not isinstance(batch, StreamBatches):
        batch = getattr(batch, "source", None)  # type: ignore[assignment]
        if batch is None:
            return None
    return batch


class Keyed(tuple[torch.Tensor, Any]):
    """A micro-batch that the model finds by itself: a tensor that names it, which is the first layer's input, and its contents."""

    __slots__ = ()


def on_device(micro_batch: Any) -> Any:
    """Returns a micro-batch with its tensors where layers compute; itself on the CPU. What is not a container or tensor stays as it is."""
    return micro_batch if device.on_host() else _moved(micro_batch)


def _moved(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return device.placed(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_moved, value))
    if isinstance(value, tuple | list):
        return type(value)(map(_moved, value))
    if isinstance(value, dict):
        moved = {key: _moved(item) for key, item in value.items()}
        return moved if type(value) is dict else type(value)(**moved)
    if isinstance(value, Mapping):
        return {key: _moved(item) for key, item in value.items()}
    return value


def placing(batch: Batch) -> Batch:
    """Returns a function that loads micro-batches to where layers compute."""
    return batch if device.on_host() else lambda step, micro_batch: on_device(batch(step, micro_batch))


def model_input(micro_batch: Any) -> Any:
    """Returns the first layer's input: of a tuple or list the first element; a tensor or a dict as it is.

    A mapping that is not a dict, such as the `BatchEncoding` of transformers, becomes one.
    """
    value = micro_batch[0] if isinstance(micro_batch, tuple | list) else micro_batch
    return dict(value) if isinstance(value, Mapping) else value


def tokens_in(micro_batch: Any) -> int:
    """Returns the number of tokens if the model's input holds integer ids of shape (samples, tokens); else 0."""
    value = model_input(micro_batch[1] if isinstance(micro_batch, Keyed) else micro_batch)
    if isinstance(value, dict):
        value = value.get("input_ids")
    if isinstance(value, torch.Tensor) and value.ndim == 2 and not value.is_floating_point():
        return value.numel()
    return 0
