"""Collects whole tensors on every member from the parts that owners hold, for `trainer.state_dict()`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from elastic.comm.rounds import Rounds
from elastic.engine.shard import Shard
from elastic.layout.regions import ModelSpec
from elastic.memory.tensors import bytes_of, copy, of_bytes, zeros

Sequence = Callable[[], int]


def whole(rounds: Rounds, sequence: Sequence, owned: Iterable[Shard], spec: ModelSpec, state: str) -> dict[str, torch.Tensor]:
    """Returns the state of every trainable parameter that has it, by name. All members must call it together. Sends one layer at a time."""
    shards = list(owned)
    found: dict[str, torch.Tensor] = {}
    for layer in spec.layers:
        if not layer.size:
            continue
        parts = {
            f"{shard.interval.start} {str(shard.memory[state].dtype).removeprefix('torch.')}": bytes_of(shard.memory[state])
            for shard in shards
            if shard.layer == layer.index and state in shard.memory
        }
        collected = rounds.gather(sequence(), ({}, parts))
        joined: dict[str, np.ndarray] | None = None
        if collected is not None:
            joined = {name: memory for _, arrays in collected.values() for name, memory in (arrays or {}).items()}
        _, arrays = rounds.broadcast(sequence(), None if joined is None else ({}, joined))
        flat: torch.Tensor | None = None
        for name, memory in (arrays or {}).items():
            start, dtype = name.split()
            run = of_bytes(memory, getattr(torch, dtype))
            if flat is None:
                flat = zeros(layer.size, run.dtype)
            flat[int(start) : int(start) + run.numel()] = run
        if flat is not None:
            found |= {p.name: copy(flat[p.start : p.stop].view(p.shape)) for p in layer.parameters}
    return found
