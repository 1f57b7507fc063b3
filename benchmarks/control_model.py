"""The model, the announcements and the inventories of `control_plane.py`: as large as those of a GPT of `layers` blocks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from elastic.layout.regions import LayerSpec, ModelSpec
from elastic.recovery.inventory import Copy, Inventory, Progress
from elastic.view import View

_VOCABULARY, _SEQUENCE = 50304, 2048
_GROUP = {
    "lr": 1e-3,
    "betas": [0.9, 0.95],
    "eps": 1e-8,
    "weight_decay": 0.1,
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The model's sizes, and how a step is cut. A worker holds `grains / members of its stage` grains."""

    blocks: int = 48
    dim: int = 1024
    micro_batches: int = 512
    grains: int = 256
    step: int = 7  # the newest step in inventories

    @cached_property
    def model(self) -> ModelSpec:
        """The layers: embeddings, blocks, head."""
        first = [("wte.weight", (_VOCABULARY, self.dim), "float32"), ("wpe.weight", (_SEQUENCE, self.dim), "float32")]
        last = [("ln.weight", (self.dim,), "float32"), ("head.weight", (_VOCABULARY, self.dim), "float32")]
        blocks = [self._block(f"h.{number}.") for number in range(self.blocks)]
        return ModelSpec(layers=tuple(LayerSpec.build(index, layer) for index, layer in enumerate([first, *blocks, last])))

    def _block(self, prefix: str) -> list[tuple[str, tuple[int, ...], str]]:
        dim = self.dim
        shapes = {
            "ln1": (dim,),
            "attn.qkv": (3 * dim, dim),
            "attn.out": (dim, dim),
            "ln2": (dim,),
            "mlp.up": (4 * dim, dim),
            "mlp.down": (dim, 4 * dim),
        }
        return [(f"{prefix}{name}.{what}", size, "float32") for name, (rows, *rest) in shapes.items() for what, size in _two(rows, rest)]

    @property
    def fingerprint(self) -> dict[str, str]:
        """What the workers' numbers would depend on."""
        return {"torch": "2.13.0", "python": "3.11", "machine": "x86_64", "capability": "AVX512"}

    @cached_property
    def _announced(self) -> dict[str, Any]:
        return {
            "address": "",
            "fingerprint": self.fingerprint,
            "model": self.model.to_json(),
            "digest": "0" * 32,
            "micro_batches": self.micro_batches,
            "grains": self.grains,
            "settings": {"batch_size": self.micro_batches, "micro_batch_size": 1, "optimizer": "AdamW", "seed": 0, "samples": 1 << 20},
            "state_bytes": 8.0,
            "profile": None,
            "link": [1e-5, 5e9],
            "base": 0,
            "segment": True,
            "checkpoint": None,
            "code": {f"module_{number}.py": ["0" * 64, 1000] for number in range(8)},
        }

    def ready(self, worker: int, *, first: bool) -> dict[str, Any]:
        """Returns a worker's announcement: the fields of `membership.founding.Ready`."""
        size = [layer.size for layer in self.model.layers]
        profile = [[0.01, 0.02, elements, 1 << 22, 1 << 20, 4] for elements in size] if first else None
        return {**self._announced, "address": f"127.0.0.1:{20000 + worker}", "profile": profile}


def _two(rows: int, rest: list[int]) -> list[tuple[str, tuple[int, ...]]]:
    return [("weight", (rows, *rest)), ("bias", (rows,))]


def inventories(view: View, workers: Collection[int], shape: Shape, states: Mapping[str, str]) -> dict[int, Inventory]:
    """Returns what these members would list in the middle of a step of this view: shards, previous copies, replicas, gathered layers."""
    members = set(workers).intersection(view.workers)
    found: dict[int, list[Copy]] = {worker: [] for worker in members}
    newest, before = shape.step, shape.step - 1
    for layer in view.layout.layers:
        for interval in layer.intervals:
            run: dict[str, Any] = {"layer": layer.layer, "start": interval.start, "stop": interval.stop}
            if interval.owner in members:
                found[interval.owner] += [
                    Copy(**run, step=newest, role="live", digest=None),
                    Copy(**run, step=before, role="previous", digest=f"{interval.start:032x}"),
                ]
            for holder in members.intersection(interval.replicas):
                found[holder] += [
                    Copy(**run, step=newest, role="replica", digest=None),
                    Copy(**run, step=before, role="replica", digest=f"{interval.start:032x}"),
                ]
        size = view.layout.model.layers[layer.layer].size
        for worker in members.intersection(layer.members):
            found[worker].append(Copy(layer=layer.layer, start=0, stop=size, step=newest, role="gathered"))
    return {worker: _inventory(view, worker, copies, shape, states) for worker, copies in found.items()}


def _inventory(view: View, worker: int, copies: list[Copy], shape: Shape, states: Mapping[str, str]) -> Inventory:
    held = {copy.layer for copy in copies}
    names = [parameter.name for layer in view.layout.model.layers if layer.index in held for parameter in layer.parameters]
    steps = (shape.step - 1, shape.step)
    apply = {"step": 0, "loss": 2.5, "norm": 1.0, "factor": 1.0, "stop": False, "pause": False, "skipped": False}
    return Inventory(
        worker=worker,
        yielded=shape.step,
        copies=tuple(copies),
        states=dict(states),
        scalars={step: {name: {"step": float(step + 1)} for name in names} for step in steps},
        progress={step: Progress(step=step, apply={**apply, "step": step}, groups=[_GROUP]) for step in steps},
    )
