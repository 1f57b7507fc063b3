"""Trainings with float32 masters of narrow parameters: for workers of `harness.run`, of real jobs, and in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import elastic
from elastic.engine import loss_scale
from tests.engine import models

BATCH, STEPS, GROWS_AFTER = 24, 8, 3


def narrow(build: Callable[[], list[nn.Module]], dtype: torch.dtype) -> Callable[[], list[nn.Module]]:
    return lambda: [layer.to(dtype) for layer in build()]


def rows(micro: int, dtype: torch.dtype) -> Callable[[int, int], Any]:
    """Micro-batches of so many samples, in this dtype."""
    data = models.Rows()

    def batch(step: int, micro_batch: int) -> Any:
        found = [data[(step * BATCH + micro_batch * micro + place) % len(data)] for place in range(micro)]
        return torch.stack([x for x, _ in found]).to(dtype), torch.tensor([y for _, y in found])

    return batch


def mean(output: torch.Tensor, batch: Any) -> torch.Tensor:
    return models.cross_entropy(output.float(), batch)


def large(output: torch.Tensor, batch: Any) -> torch.Tensor:
    """A loss whose gradient does not fit into float16 with the first loss scale."""
    return 4.0 * mean(output, batch)


def small(output: torch.Tensor, batch: Any) -> torch.Tensor:
    """A loss most of whose gradient vanishes in float16 without a scale."""
    return 1e-4 * mean(output, batch)


def adagrad(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(parameters, lr=0.05, initial_accumulator_value=0.125)


def adafactor(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(parameters, lr=1e-2)


def two_dtypes() -> list[nn.Module]:
    """Whole layers in different dtypes."""
    first, second, third, *rest = models.blocks(3)
    return [first.bfloat16(), Cast(torch.float32), second, Cast(torch.bfloat16), third.bfloat16(), *(layer.bfloat16() for layer in rest)]


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtype)


HALF = {"dtype": torch.float16, "loss_scale": "dynamic"}

CASES: dict[str, dict[str, Any]] = {
    "bfloat16": {"model": narrow(models.blocks, torch.bfloat16), "clip_norm": 0.3},
    "bfloat16, tied, two groups": {"model": narrow(models.tied, torch.bfloat16), "optimizer": models.two_groups, "clip_norm": 0.3},
    "bfloat16, average, momentum": {"model": narrow(models.blocks, torch.bfloat16), "optimizer": models.momentum, "average": 0.9},
    "bfloat16, initial state": {"model": narrow(models.blocks, torch.bfloat16), "optimizer": adagrad},
    "bfloat16, whole tensors": {"model": narrow(models.tied, torch.bfloat16), "optimizer": adafactor},
    "bfloat16 and float32": {"model": two_dtypes},
    "float16, loss scale": {"model": narrow(models.blocks, torch.float16), "loss": large, **HALF},
}


def plain_blocks() -> list[nn.Module]:
    """Layers without dropout, whose random numbers are keyed."""
    return [nn.Linear(models.WIDTH, models.WIDTH), *(models.Block(0.0) for _ in range(3)), models.Head()]


def trainer(name: str, micro: int = 4, **more: Any) -> elastic.Trainer:
    """A trainer of a case; `more` are further arguments, or replace those of the case."""
    loss_scale.GROWS_AFTER = GROWS_AFTER
    options = {"loss": mean, "optimizer": models.adamw, "dtype": torch.bfloat16, "master_weights": True, **CASES[name], **more}
    build, loss, optimizer, dtype = (options.pop(part) for part in ("model", "loss", "optimizer", "dtype"))
    decay = options.pop("average", None)
    torch.manual_seed(5)
    sizes = {"batch_size": BATCH, "micro_batch_size": micro, "seed": 11}
    made = elastic.Trainer(build(), loss, optimizer, rows(micro, dtype), **sizes, **options)
    if decay is not None:
        made.average(decay)
    return made


def train(_: Any, name: str, steps: int = STEPS, micro: int = 4, more: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns what each step reported, the digest, sums of masters, and the differences of parameters from their masters' roundings."""
    made = trainer(name, micro, **(more or {}))
    seen = [[r.step, r.loss, r.grad_norm if r.skipped is None else None, r.skipped, made.loss_scale] for r in made.run(steps)]
    return {"seen": seen, "digest": made.digest(), **masters(made), "bytes": made.statistics()}


def masters(made: elastic.Trainer) -> dict[str, Any]:
    """Returns sums of all masters, and how many elements of parameters are not the roundings of theirs."""
    parameters, found = made.state_dict(), made.state_dict("fp32_master")
    unlike = sum(int((found[name].to(each.dtype) != each).sum()) for name, each in parameters.items())
    finer = sum(int((found[name].to(each.dtype) != found[name]).sum()) for name, each in parameters.items())
    return {"masters": {name: each.double().sum().item() for name, each in found.items()}, "unlike": unlike, "finer": finer}


def plain(name: str, clip_norm: float | None, steps: int = STEPS) -> tuple[list[float], dict[str, torch.Tensor], list[torch.Tensor]]:
    """The same in plain torch, with masters as people write them: losses, parameters, and masters."""
    torch.manual_seed(5)
    model = nn.Sequential(*narrow(plain_blocks, torch.bfloat16)())
    kept = [each.detach().float().requires_grad_() for each in model.parameters()]
    optimizer, data, losses = CASES[name].get("optimizer", models.adamw)(kept), rows(BATCH, torch.bfloat16), []
    for step in range(steps):
        batch = data(step, 0)
        loss = mean(model(batch[0]), batch)
        loss.backward()
        for each, master in zip(model.parameters(), kept, strict=True):
            assert each.grad is not None
            master.grad = each.grad.float()
            each.grad = None
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(kept, clip_norm)
        optimizer.step()
        with torch.no_grad():
            for each, master in zip(model.parameters(), kept, strict=True):
                each.copy_(master)
        losses.append(loss.item())
    return losses, model.state_dict(), kept


def beside_plain(_: Any, name: str, clip_norm: float | None) -> dict[str, bool]:
    """Returns which results are those of the plain loop, bit by bit. One worker has the same order of sums."""
    made = trainer(name, BATCH, model=narrow(plain_blocks, torch.bfloat16), clip_norm=clip_norm)
    losses = [report.loss for report in made.run(STEPS)]
    theirs, parameters, kept = plain(name, clip_norm)
    own, found = made.state_dict(), made.state_dict("fp32_master")
    same = [torch.equal(found[key], master) for key, master in zip(own, kept, strict=True)]
    return {"losses": losses == theirs, "parameters": all(torch.equal(own[key], parameters[key]) for key in own), "masters": all(same)}


def losses(_: Any, name: str, more: dict[str, Any]) -> list[float]:
    """Returns the losses of a case."""
    return [report.loss for report in trainer(name, **more).run(STEPS)]
