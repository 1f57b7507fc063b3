"""The spare: what this worker owned one step ago, so that a step that was applied on some workers only can be taken back."""

from __future__ import annotations

import torch

from elastic.engine.zero import ShardedOptimizer
from snapshot.held import Held


class Spares:
    """One spare of every owned shard, in memory that is used again and again."""

    def __init__(self, optimizer: ShardedOptimizer) -> None:
        self._updater = optimizer.owned
        self._memory: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        self.held: list[Held] = []

    @property
    def bytes(self) -> int:
        """Memory of all spares."""
        return sum(memory.nbytes for spare in self._memory.values() for memory in spare.values())

    def take(self, step: int) -> None:
        """Copies what is owned, which is at step `step`."""
        self.held = []  # of two steps ago: about to be overwritten
        self.held = [
            Held(
                layer=shard.layer,
                start=shard.interval.start,
                stop=shard.interval.stop,
                step=step,
                role="spare",
                memory=self._copy(key, shard.memory),
                scalars=self._updater.scalars(shard),
            )
            for key, shard in self._updater.shards.items()
        ]

    def _copy(self, key: tuple[int, int], source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        spare = self._memory.setdefault(key, {})
        for name, values in source.items():
            if name in spare:
                spare[name].copy_(values)
            else:
                spare[name] = values.clone()
        return dict(spare)
