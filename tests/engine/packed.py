"""Trainings with several dtypes in a layer, with float64, and with frozen weights that are packed in 4 or 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import elastic
from elastic.layout.regions import ITEMSIZE
from elastic.memory.digest import digest
from tests.engine import mastered, models

WIDE = 128
"""Rows of packed weights, so that a matrix is larger than what every worker may have."""


class Mixed(nn.Module):
    """Trains three dtypes, as models do that keep norms and gates wider than matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(models.WIDTH)
        self.inner = nn.Linear(models.WIDTH, 3 * models.WIDTH).bfloat16()
        self.outer = nn.Linear(3 * models.WIDTH, models.WIDTH).bfloat16()
        self.gate = nn.Parameter(torch.full((models.WIDTH,), 0.5, dtype=torch.float64))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = functional.gelu(self.inner(self.norm(x).bfloat16()))
        return x + (self.dropout(self.outer(hidden)).double() * self.gate).float()


class Packed(nn.Module):
    """A linear layer on frozen 4-bit weights, with a trained adapter: the weight is a parameter of bytes, two numbers in each.

    Its scales are float32, of each row; an offset is 8-bit and a buffer.
    """

    def __init__(self) -> None:
        super().__init__()
        codes = torch.arange(WIDE * models.WIDTH // 2) % 251
        self.codes = nn.Parameter(codes.to(torch.uint8).view(WIDE, -1), requires_grad=False)
        self.scales = nn.Parameter(0.01 + torch.arange(WIDE) / (40.0 * WIDE), requires_grad=False)
        self.register_buffer("offset", (torch.arange(WIDE * models.WIDTH) % 3 - 1).to(torch.int8).view(WIDE, -1))
        self.back = nn.Parameter((torch.randn(models.WIDTH, WIDE) * 0.1).to(torch.float8_e4m3fn), requires_grad=False)
        self.down = nn.Linear(models.WIDTH, 8, bias=False)
        self.up = nn.Linear(8, WIDE, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low, high = self.codes & 15, self.codes >> 4
        weight = torch.stack([low, high], dim=-1).view(WIDE, -1).float() - 7.5 + self.get_buffer("offset")
        hidden = functional.linear(x, weight * self.scales[:, None] * 0.3) + self.up(self.down(x))
        return x + functional.linear(torch.tanh(hidden), self.back.float())


FROZEN_BYTES = WIDE * models.WIDTH // 2 + 4 * WIDE + WIDE * models.WIDTH + models.WIDTH * WIDE
"""Of one `Packed`; all its tensors begin at multiples of 64 elements."""


def adafactor(parameters: Any) -> torch.optim.Optimizer:
    """Has a group for each dtype: else it takes the epsilon of the first one's."""
    groups: dict[torch.dtype, list[Any]] = {}
    for each in parameters:
        groups.setdefault(each.dtype, []).append(each)
    return torch.optim.Adafactor([{"params": found} for found in groups.values()], lr=1e-2)


class Every(nn.Module):
    """Has frozen parameters and buffers of all dtypes that can be moved, of sizes that blocks do not divide, and uses each."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(models.WIDTH, models.WIDTH)
        for place, dtype in enumerate(sorted(ITEMSIZE)):
            size = ITEMSIZE[dtype]
            numbers = ((torch.arange(4999 * size) + place) % (2 if dtype == "bool" else 100)).to(torch.uint8)
            self.register_parameter(f"p_{dtype}", nn.Parameter(numbers.view(getattr(torch, dtype)), requires_grad=False))
            self.register_buffer(f"b_{dtype}", numbers.roll(size).view(getattr(torch, dtype)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held = [tensor for tensor in (*self.parameters(), *self.buffers()) if not tensor.requires_grad]
        total = sum(int(tensor.view(torch.uint8)[::7].sum()) % 64 for tensor in held)
        return x + torch.tanh(self.linear(x)) * (total / 1024)


class Shared(nn.Module):
    """Uses the packed weights of another layer."""

    def __init__(self, other: Packed) -> None:
        super().__init__()
        self.back = other.back
        self.linear = nn.Linear(models.WIDTH, WIDE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + functional.linear(self.linear(x), self.back.float())


def mixed() -> list[nn.Module]:
    return [nn.Linear(models.WIDTH, models.WIDTH), Mixed(), Mixed(), Mixed(), models.Head()]


def double() -> list[nn.Module]:
    first, *rest = models.blocks(3)
    return [nn.Sequential(mastered.Cast(torch.float64), first.double()), *(layer.double() for layer in rest)]


def packed() -> list[nn.Module]:
    first = Packed()
    return [nn.Linear(models.WIDTH, models.WIDTH), first, Packed(), Packed(), Shared(first), models.Head()]


def every() -> list[nn.Module]:
    return [Every(), nn.Linear(models.WIDTH, models.WIDTH), Every(), models.Head()]


CASES: dict[str, dict[str, Any]] = {
    "mixed": {"model": mixed, "optimizer": models.two_groups, "clip_norm": 0.5},
    "mixed, masters, average": {"model": mixed, "master_weights": True, "average": 0.9},
    "mixed, whole tensors": {"model": mixed, "optimizer": adafactor},
    "double": {"model": double},
    "every dtype": {"model": every},
    "packed": {"model": packed, "clip_norm": 0.5},
    "packed, average, momentum": {"model": packed, "optimizer": models.momentum, "average": 0.9},
}


def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
    return functional.cross_entropy(output, batch[1])


def train(_: Any, name: str, steps: int = 4, more: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns what the steps reported, the digest, sums of the whole state_dict, and figures."""
    options: dict[str, Any] = {"optimizer": models.adamw, **CASES[name], **(more or {})}
    build: Callable[[], Any] = options.pop("model")
    decay, optimizer = options.pop("average", None), options.pop("optimizer")
    torch.manual_seed(5)
    layers = build()
    trainer = elastic.Trainer(layers, loss, optimizer, models.Rows(), seed=11, batch_size=24, micro_batch_size=4, **options)
    if decay is not None:
        trainer.average(decay)
    reports = [(r.step, r.loss, r.grad_norm) for r in trainer.run(steps)]
    whole = {key: digest(each) for key, each in trainer.state_dict().items()}
    figures = {"statistics": trainer.statistics(), "here": untrained_bytes(layers), "layers": trainer._engine.executor._layers}
    return {"reports": reports, "digest": trainer.digest(), "whole": whole, **figures}


def untrained_bytes(layers: list[nn.Module]) -> list[int]:
    """Returns the bytes of what each layer does not train, as it is in this process's memory."""
    return [sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()) if not t.requires_grad) for layer in layers]


def careless(_: Any, where: str) -> list[int]:
    """Changes packed weights in a loop body."""
    layers = packed()
    trainer = elastic.Trainer(layers, loss, models.adamw, models.Rows(), seed=11, batch_size=24, micro_batch_size=4)
    steps = []
    for report in trainer.run(4):
        steps.append(report.step)
        if report.step == 1:
            with torch.no_grad():
                tensor = layers[1].get_parameter("codes") if where == "codes" else layers[1].get_buffer("offset")
                tensor.zero_()
    return steps


def state_of(_: Any) -> list[str]:
    """Calls `state_dict` of a layer that may be elsewhere."""
    layers = packed()
    elastic.Trainer(layers, loss, models.adamw, models.Rows(), seed=11, batch_size=24, micro_batch_size=4)
    return [*layers[1].state_dict()]


def beside_plain(_: Any, name: str, steps: int = 4) -> dict[str, bool]:
    """Returns which results are those of plain torch, bit by bit; without dropout, and with the whole batch as one micro-batch."""
    data = models.Rows()
    batch = torch.stack([data[i][0] for i in range(24)]), torch.tensor([data[i][1] for i in range(24)])
    torch.manual_seed(5)
    layers = [layer.eval() for layer in CASES[name]["model"]()]
    trainer = elastic.Trainer(layers, loss, models.adamw, lambda step, micro: batch, batch_size=24, micro_batch_size=24)
    losses = [report.loss for report in trainer.run(steps)]
    theirs, parameters = plain(name, steps)
    own = trainer.state_dict()
    return {"losses": losses == theirs, "tensors": all(torch.equal(own[key], each) for key, each in parameters.items())}


def plain(name: str, steps: int = 4) -> Any:
    """The same in plain torch, without dropout, and the whole batch at once: losses and the state_dict."""
    torch.manual_seed(5)
    model, found = nn.Sequential(*CASES[name]["model"]()).eval(), []
    optimizer, data = models.adamw([each for each in model.parameters() if each.requires_grad]), models.Rows()
    batch = torch.stack([data[i][0] for i in range(24)]), torch.tensor([data[i][1] for i in range(24)])
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model(batch[0]), batch)
        value.backward()
        optimizer.step()
        found.append(value.item())
    return found, model.state_dict()


BUILDERS = [lambda: nn.Linear(models.WIDTH, models.WIDTH), Packed, Packed, Packed, models.Head]


def from_files(_: Any, folder: str, masters: bool = False) -> dict[str, Any]:
    """Trains a model that is built by functions, with values from files."""
    more = {"master_weights": masters, "weights": folder}
    trainer = elastic.Trainer(
        BUILDERS, loss, lambda p: torch.optim.AdamW(p, lr=3e-3), models.Rows(), seed=11, batch_size=24, micro_batch_size=4, **more
    )
    losses = [report.loss for report in trainer.run(3)]
    whole = {name: each.double().sum().item() for name, each in trainer.state_dict().items() if not name.endswith(("weight", "bias"))}
    return {"losses": losses, "digest": trainer.digest(), "whole": whole, "statistics": trainer.statistics()}
