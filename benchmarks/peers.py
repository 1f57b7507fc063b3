"""One rank of a peer in the throughput benchmark: DistributedDataParallel, or 1F1B of torch.distributed.pipelining, both on Gloo.

    MASTER_ADDR=... MASTER_PORT=... RANK=... WORLD_SIZE=... python benchmarks/peers.py '{"kind": "ddp", ...}'

Rank 0 prints one JSON object: the times at which its steps ended, and the losses of the whole batch. Some choices favour the peers: sample
indices are computed before the first step, buckets share memory with gradients, the pipeline's gradients are scaled by scaling the loss
instead of in another pass, its outputs are not merged, and losses are exchanged only after the last step.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from subject import SEED, build_model, build_optimizer, build_text, cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate

from elastic.engine.sampler import samples

PeerBatch = list[torch.Tensor]
PeerStep = Callable[[int], torch.Tensor]
"""Takes one step and returns this rank's loss; 0 on a rank that has none."""

_TIMEOUT = timedelta(seconds=120)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSettings:
    """What a rank runs. `kind` is `ddp` or `pipeline`, `cut` the layers per stage. A `ddp` rank runs `micro_batch` samples at a time."""

    kind: str
    batch: int
    micro_batch: int
    steps: int
    cut: tuple[int, ...]
    bucket_mb: float | None = None


class PeerLoader:
    """Loads the same samples in the same order as our side. `positions` are those of the batch that this rank reads."""

    def __init__(self, settings: PeerSettings, positions: range) -> None:
        self._text = build_text()
        self._indices = [
            [sample.index for sample in samples(SEED, step, settings.batch, len(self._text), positions)] for step in range(settings.steps)
        ]

    def __call__(self, step: int) -> PeerBatch:
        """Returns tokens and targets, each (samples, seq)."""
        return default_collate([self._text[index] for index in self._indices[step]])


def ddp_step(settings: PeerSettings) -> PeerStep:
    """Returns a step over this rank's share of the batch, `micro_batch` samples at a time; only the last backward exchanges gradients."""
    rank, share = dist.get_rank(), settings.batch // dist.get_world_size()
    load = PeerLoader(settings, range(rank * share, (rank + 1) * share))
    model = DistributedDataParallel(build_model(), gradient_as_bucket_view=True, bucket_cap_mb=settings.bucket_mb)
    optimizer = build_optimizer(model)
    pieces = share // settings.micro_batch

    def step(number: int) -> torch.Tensor:
        total = torch.zeros(())
        tokens, targets = (part.chunk(pieces) for part in load(number))
        for piece in range(pieces):
            with nullcontext() if piece == pieces - 1 else model.no_sync():
                loss = cross_entropy(model(tokens[piece]), (tokens[piece], targets[piece])) / pieces
                loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return total / dist.get_world_size()

    return step


def pipeline_step(settings: PeerSettings) -> PeerStep:
    """Returns a step that runs this rank's stage for all micro-batches of the batch."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B  # imported here: it is slow, and would count in DDP's start-up

    rank, stages = dist.get_rank(), dist.get_world_size()
    first, stop = list(pairwise(accumulate(settings.cut, initial=0)))[rank]
    module = build_model()[first:stop]
    micro_batches = settings.batch // settings.micro_batch
    schedule = Schedule1F1B(
        PipelineStage(module, rank, stages, torch.device("cpu")),
        micro_batches,
        lambda output, target: cross_entropy(output, (target, target)) / micro_batches,
        scale_grads=False,
    )
    load = PeerLoader(settings, range(settings.batch))
    optimizer = build_optimizer(module)

    def step(number: int) -> torch.Tensor:
        losses: list[torch.Tensor] = []
        if rank == 0:
            schedule.step(load(number)[0], return_outputs=False)
        elif rank == stages - 1:
            schedule.step(target=load(number)[1], losses=losses, return_outputs=False)
        else:
            schedule.step(return_outputs=False)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).sum().detach() if losses else torch.zeros(())

    return step


def run(settings: PeerSettings) -> dict[str, Any]:
    """Takes the steps. Time stamps are from the monotonic clock, which all processes of a machine share."""
    torch.set_num_threads(1)
    step = ddp_step(settings) if settings.kind == "ddp" else pipeline_step(settings)
    gc.collect()
    gc.freeze()  # as our workers do
    stamps, losses = [], []
    for number in range(settings.steps):
        losses.append(step(number))
        stamps.append(time.monotonic())
    whole = torch.stack(losses)
    dist.all_reduce(whole)
    return {"stamps": stamps, "losses": whole.tolist()}


def main() -> None:
    """Entry of the process: argv is the settings as JSON."""
    given = json.loads(sys.argv[1])
    dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        result = run(PeerSettings(**{**given, "cut": tuple(given["cut"])}))
        if dist.get_rank() == 0:
            print(json.dumps(result), flush=True)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # Gloo's threads sometimes abort a normal exit of the interpreter


if __name__ == "__main__":
    main()
