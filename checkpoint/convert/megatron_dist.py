"""Reads Megatron's `torch_dist`: a distributed checkpoint of torch with Megatron's keys, and values that are not tensors in `common.pt`.

From megatron-core 0.16 (`core/dist_checkpointing`). Equal layers are one tensor with the layers as its first dimension, under a
key without their number (`decoder.layers.mlp.linear_fc1.weight`); states of the optimizer are `optimizer.state.STATE.KEY`, with main
values as `fp32_param`. `common.pt` holds the groups without their parameters, and one step for all. Tensors are whole, so rules for
ranks are not needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from elastic.checkpoint.convert.dcp import METADATA, is_described_tensor, items, read_metadata, tensor
from elastic.checkpoint.convert.megatron import folder_of, namespace
from elastic.checkpoint.convert.megatron_optimizer import MegatronScalars, RankOptimizer, contents_of, grouped
from elastic.checkpoint.convert.nested import Nested
from elastic.checkpoint.convert.optimizer import settings_of
from elastic.checkpoint.convert.rules import Rules
from elastic.checkpoint.pickles import load, number, plain
from elastic.checkpoint.state import PARAM, Group, Spec
from elastic.checkpoint.stored import Files, ReadableTensor
from elastic.checkpoint.strict_json import loads
from elastic.errors import CheckpointError

COMMON, CONFIG = "common.pt", "metadata.json"
_STATES = "optimizer.state."
_MAIN = "fp32_param"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """One layer of a tensor whose first dimension is the layers."""

    held: ReadableTensor
    index: int

    @property
    def spec(self) -> Spec:
        """Shape and dtype of the layer's tensor."""
        return Spec(shape=self.held.spec.shape[1:], dtype=self.held.spec.dtype)

    def run(self, start: int, stop: int) -> torch.Tensor:
        """Reads a run, flat."""
        first = self.index * self.spec.elements
        return self.held.run(first + start, first + stop)


def recognise(path: Path) -> str | None:
    """Returns why a path is such a checkpoint; None if it is not."""
    folder = folder_of(path) if path.is_dir() else path
    if not all((folder / name).is_file() for name in (METADATA, CONFIG, COMMON)):
        return None
    return (
        f"it has {METADATA}, {COMMON}, and {CONFIG} of Megatron" if "torch_dist" in (folder / CONFIG).read_text(errors="replace") else None
    )


def _of_layers(name: str, held: ReadableTensor, layers: int) -> dict[str, ReadableTensor]:
    """Returns a key's tensors by their names in a model. Raises CheckpointError if the number of layers is not that of `args`."""
    before, stacked, after = name.partition(".layers.")
    if not stacked or after.partition(".")[0].isdigit():
        return {name: held}
    if not held.spec.shape or held.spec.shape[0] != layers:
        raise CheckpointError(f"{name} has shape {list(held.spec.shape)}; its first dimension should be the {layers} layers of args")
    return {f"{before}.layers.{index}.{after}": LayerRow(held=held, index=index) for index in range(layers)}


def _tensors(described: Mapping[str, Any], pieces: Any, layers: int, rules: Rules) -> dict[tuple[str, str], ReadableTensor]:
    found: dict[tuple[str, str], ReadableTensor] = {}
    for key, item in described.items():
        if not is_described_tensor(item) or (key.startswith("optimizer") and rules.drops("optimizer")):
            continue
        state, name = PARAM, key
        if key.startswith(_STATES):
            state, _, name = key.removeprefix(_STATES).partition(".")
        elif key.startswith(("optimizer.", "chained_")):
            raise CheckpointError(
                f"{key} is a state of the optimizer that is not stored by parameter: save it as fully_reshardable, or "
                'leave out the optimizer by the rule drop = ["optimizer"]'
            )
        if rules.drops(name) or rules.drops(key):
            continue
        for one, value in _of_layers(name, tensor(key, item, pieces), layers).items():
            if not rules.drops(one):
                found[one, state] = value
    mains = {(name, PARAM): value for (name, state), value in found.items() if state == _MAIN}
    return {key: value for key, value in (found | mains).items() if key[1] != _MAIN}


def _optimizer(
    common: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], rules: Rules, where: str
) -> tuple[list[Group], MegatronScalars]:
    """Returns the groups, and the numbers of every parameter."""
    value = common.get("optimizer")
    if not isinstance(value, Mapping) or rules.drops("optimizer"):
        return [], {}
    inner = value.get("optimizer", value)
    listed = inner["param_groups"]
    step = number((inner.get("state") or {}).get("common_step"))
    found = RankOptimizer()
    for settings, names in zip(listed, grouped(listed, shapes, rules, where), strict=True):
        kept = settings_of(settings, f"{where}: a group of the optimizer")
        own = kept.pop("step", None)
        for name in names:
            if (taken := own if step is None else step) is not None:
                found.scalars[name] = {"step": taken}
        found.groups.append(Group(names=tuple(names), settings=kept))
    return found.groups, found.scalars


def open_torch_dist(path: Path, *, trust_pickle: bool = False, rules: Rules | None = None) -> Nested:
    """Opens a checkpoint, or the one that `latest_checkpointed_iteration.txt` names. Raises CheckpointError."""
    files, rules, folder = Files(), rules or Rules(), folder_of(path)
    try:
        loads(files.read(folder / CONFIG, 0, files.size(folder / CONFIG)), str(folder / CONFIG), special_floats=True)
        common = load(folder / COMMON, trusted=trust_pickle, files=files)
        args = namespace(common.get("args"))
        metadata, pieces = read_metadata(folder, files, trust=trust_pickle)
        tensors = _tensors(items(metadata), pieces, int(args.get("num_layers") or 0), rules)
        shapes = {name: value.spec.shape for (name, state), value in tensors.items() if state == PARAM}
        groups, scalars = _optimizer(common, shapes, rules, str(folder / COMMON))
    except CheckpointError:
        files.close()
        raise
    except (AttributeError, KeyError, LookupError, TypeError, ValueError) as error:
        files.close()
        raise CheckpointError(f"{folder}: it does not have the structure of Megatron's torch_dist: {error}") from error
    dropped: list[str] = []
    kept = {key: plain(value, dropped) for key, value in common.items() if key not in ("optimizer", "args", "rng_state")}
    extra = {"step": common.get("iteration"), "megatron": {**kept, "args": plain(args, dropped), "not_read": dropped}}
    contents = contents_of(tensors, groups, scalars, ties={}, extra=extra, rules=rules)
    return Nested(format="megatron-dist", contents=contents, tensors=tensors, files=files, check=pieces.verify)
