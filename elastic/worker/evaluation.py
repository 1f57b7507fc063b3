"""An evaluation: its micro-batches, and the state of layers and generators around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from elastic.engine import randomness
from elastic.engine.data import is_stream
from elastic.errors import TrainerError


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationData:
    """The first `count` micro-batches of `micro_batch_size` samples of a dataset, in order; the last may be smaller."""

    dataset: Any
    micro_batch_size: int
    count: int
    collate: Callable[[list[Any]], Any]
    seed: int

    @classmethod
    def of(
        cls, dataset: Any, micro_batch_size: int, micro_batches: int | None, collate: Callable[[list[Any]], Any] | None, seed: int
    ) -> EvaluationData:
        """Raises TrainerError for data that is empty or has no random access."""
        if is_stream(dataset):
            raise TrainerError(
                f"a {type(dataset).__name__} can only be read in order, and an evaluation is spread over workers: give evaluate() a "
                "map-style dataset (__len__ and __getitem__), such as a list of its samples"
            )
        whole = -(-len(dataset) // micro_batch_size)
        count = whole if micro_batches is None else min(micro_batches, whole)
        if count < 1:
            raise TrainerError("there is nothing to evaluate: the dataset is empty")
        collate = collate or torch.utils.data.default_collate
        return cls(dataset=dataset, micro_batch_size=micro_batch_size, count=count, collate=collate, seed=seed)

    def _samples(self, micro_batch: int) -> range:
        size = self.micro_batch_size
        return range(micro_batch * size, min((micro_batch + 1) * size, len(self.dataset)))

    def share(self, micro_batch: int) -> float:
        """Returns the micro-batch's number of samples over that of a full one."""
        return len(self._samples(micro_batch)) / self.micro_batch_size

    def load(self, micro_batch: int) -> Any:
        """Loads a micro-batch. A sample's random numbers are determined by the seed and its place in the dataset."""
        drawn = []
        for sample in self._samples(micro_batch):
            randomness.seed_all(self.seed, "evaluate", "sample", sample)
            drawn.append(self.dataset[sample])
        return self.collate(drawn)


def evaluated(root: nn.Module, data: EvaluationData, evaluate: Callable[..., tuple[float, float]]) -> tuple[float, float]:
    """Calls `evaluate(count, load, share)` with the layers in evaluation mode; puts modes and generators back afterwards."""
    training = [(module, module.training) for module in root.modules()]
    root.eval()
    try:
        with randomness.kept():  # the loop's later draws must not depend on which layers are here
            return evaluate(data.count, data.load, data.share)
    finally:  # before a recovery, which may take a step again
        for module, mode in training:
            module.training = mode
