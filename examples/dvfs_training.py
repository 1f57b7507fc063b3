"""A training whose layers occupy stand-in GPUs: their time follows the GPU's clock, and their results do not."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from nvml_standin import computing
from torch import nn

import elastic


class _Occupy(torch.autograd.Function):
    """A linear layer's product, computed while the GPU is occupied for `seconds` forward and twice as long backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, uuid: str, seconds: float, beta: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.work = uuid, seconds, beta
        with computing(uuid, seconds, beta):
            return torch.tanh(x @ weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        uuid, seconds, beta = ctx.work
        with computing(uuid, 2 * seconds, beta):
            inner = gradients[0] * (1 - torch.tanh(x @ weight) ** 2)
            return inner @ weight.T, x.T @ inner, None, None, None


class GpuLayer(nn.Module):
    """A layer that takes `seconds` of a GPU for a micro-batch's forward at its highest clock."""

    def __init__(self, width: int, uuid: str, seconds: float, beta: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.work = uuid, seconds, beta

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Occupy.apply(x, self.weight, *self.work)  # pyright: ignore[reportReturnType]


def claim(uuids: Sequence[str], directory: Path) -> str:
    """Returns a GPU that no living worker has claimed."""
    while True:
        for uuid in uuids:
            descriptor = os.open(directory / f"{uuid}.worker", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return uuid  # the descriptor stays open as long as the process lives
            except BlockingIOError:
                os.close(descriptor)
        time.sleep(0.02)


def train(job: elastic.Job, options: dict[str, Any]) -> Any:
    """Trains; `options`: uuids, directory (of claims), layers, width, seconds, beta, steps, micro_batches. Returns digest and loss."""
    uuid = claim(options["uuids"], Path(options["directory"]))
    job.use_gpu(uuid)
    torch.manual_seed(1)
    width = options["width"]
    model = nn.Sequential(*(GpuLayer(width, uuid, options["seconds"], options["beta"]) for _ in range(options["layers"])))
    samples = torch.randn(512, width, generator=torch.Generator().manual_seed(2))
    trainer = elastic.Trainer(
        model,
        lambda output, batch: ((output - batch[1]) ** 2).mean(),
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        torch.utils.data.TensorDataset(samples, samples.flip(1)),
        batch_size=4 * options["micro_batches"],
        micro_batch_size=4,
        seed=1,
    )
    loss = 0.0
    for report in trainer.run(steps=options["steps"]):
        loss = report.loss
        trainer.log(os.path.join(options["directory"], "steps.jsonl"), at=time.monotonic(), loss=report.loss)
    return [trainer.digest(), loss]
