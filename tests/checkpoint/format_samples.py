"""Small states to save, and functions that compare them with loaded ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from elastic.checkpoint.reader import ElasticSource
from elastic.checkpoint.state import PARAM, Contents, Group, Spec

Values = Mapping[tuple[str, str], torch.Tensor]

SHAPES = {"embed.weight": (70, 1000), "h.0.bias": (129,), "h.0.empty": (0, 3), "h.0.scale": (), "h.0.weight": (33, 65)}
DTYPES = {"h.0.weight": torch.bfloat16, "h.0.bias": torch.float16}


def values_at(step: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> Values:
    """Random, and other ones at every step: parameters in several dtypes, Adam's states in float32, an integer buffer."""
    generator = torch.Generator().manual_seed(step)
    values: dict[tuple[str, str], torch.Tensor] = {}
    for name, shape in shapes.items():
        values[name, PARAM] = torch.randn(shape, generator=generator).to(DTYPES.get(name, torch.float32))
        for state in ("exp_avg", "exp_avg_sq"):
            values[name, state] = torch.randn(shape, generator=generator)
    values["h.0.count", PARAM] = torch.randint(0, 1 << 40, (3,), generator=generator)
    return values


def contents_of(values: Values, step: int | None = None) -> Contents:
    """Returns the contents that describe such values."""
    tensors: dict[str, dict[str, Spec]] = {}
    for (name, state), tensor in values.items():
        tensors.setdefault(name, {})[state] = Spec(shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))
    trained = tuple(name for name in tensors if "exp_avg" in tensors[name])
    return Contents(
        tensors=tensors,
        scalars={name: {"step": 12.0, "foreach": True} for name in trained},
        groups=(
            Group(names=trained[:2], settings={"lr": 1e-3, "betas": [0.9, 0.999], "clip": float("inf")}),
            Group(names=trained[2:], settings={"lr": 0.1 + 0.2, "weight_decay": 0, "fused": None}),
        ),
        ties={"lm_head.weight": trained[0]},
        buffers=frozenset({"h.0.count"}),
        step=step,
        extra={"seed": 2**60 + 1, "scheduler": {"last_lr": [1e-3], "best": float("-inf")}, "größe": "ß"},
        files={"config.json": b'{"model_type": "sample"}'},
    )


def whole_runs(values: Values) -> list[tuple[str, str, int, torch.Tensor]]:
    return [(name, state, 0, tensor) for (name, state), tensor in values.items()]


def equals(source: ElasticSource, values: Values) -> bool:
    """Whether it holds exactly these values, bit for bit, and announces them so. Reads everything."""
    if source.contents != contents_of(values, source.manifest.step):
        return False
    for (name, state), tensor in values.items():
        found = source.read(name, state, 0, tensor.numel())
        if found.dtype != tensor.dtype or not torch.equal(found.view(torch.uint8), tensor.reshape(-1).view(torch.uint8)):
            return False
    return True
