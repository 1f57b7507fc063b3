"""Reads Megatron's optimizers, whose files number parameters: maps numbers to names.

From Megatron-Core 0.16 (`core/optimizer/__init__.py`, `core/optimizer/optimizer.py`). Parameters are grouped by multipliers, in the order
of the model; biases and vectors have no weight decay (`wd_mult` 0). In mixed precision `fp32_from_fp16_params` holds, by group and in
order, the main values of the model's 16-bit parameters; the main values of others are the model's own. Apex keeps the step in the group,
torch in every state, `dist_checkpointing` once for all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from elastic.checkpoint.convert.optimizer import settings_of
from elastic.checkpoint.convert.rules import Rules
from elastic.checkpoint.dtypes import dtype_of
from elastic.checkpoint.pickles import number
from elastic.checkpoint.state import PARAM, Contents, Group, Spec
from elastic.checkpoint.stored import ReadableTensor, is_tensor
from elastic.errors import CheckpointError

OptimizerTensors = Mapping[tuple[str, str], ReadableTensor]
MegatronScalars = dict[str, dict[str, float | int | bool]]


@dataclass(slots=True, kw_only=True)
class RankOptimizer:
    """The optimizer of one rank's file: its parts of tensors, numbers by parameter, and groups."""

    tensors: dict[tuple[str, str], ReadableTensor] = field(default_factory=dict)
    scalars: MegatronScalars = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)


def grouped(groups: Sequence[Mapping[str, Any]], shapes: Mapping[str, Sequence[int]], rules: Rules, where: str) -> list[list[str]]:
    """Returns the names of each group's parameters, in order; `shapes` in the order of the model.

    Rules that state the groups come first, then weight decay. Raises CheckpointError if weight decay does not distinguish the groups.
    """
    patterns = rules.order.groups
    if patterns:
        if len(patterns) != len(groups):
            raise CheckpointError(f"{where}: the optimizer has {len(groups)} groups, but rule optimizer.groups has {len(patterns)}")
        taken: list[list[str]] = [[] for _ in groups]
        for name in shapes:
            at = next((index for index, pattern in enumerate(patterns) if re.search(pattern, name)), None)
            if at is not None:
                taken[at].append(name)
        return taken
    decayed = [group.get("wd_mult", 1.0) != 0 for group in groups]
    if len(set(decayed)) < len(groups):
        raise CheckpointError(
            f"{where}: the optimizer has {len(groups)} groups, which weight decay does not distinguish: state the parameters of each "
            'by a rule: [optimizer] groups = ["regex of the first group", ...]'
        )
    if len(groups) == 1:
        return [list(shapes)]
    return [[name for name, shape in shapes.items() if (len(shape) > 1 and not name.endswith(".bias")) == decays] for decays in decayed]


def read_rank(value: Any, model: Mapping[str, ReadableTensor], rules: Rules, where: str) -> RankOptimizer:
    """Reads one rank's optimizer; `model` is the rank's part, by names of the whole. Empty without one, or if a rule drops `optimizer`."""
    found = RankOptimizer()
    if value is None or rules.drops("optimizer"):
        return found
    inner = value.get("optimizer", value)
    mains = [list(group) for group in value.get("fp32_from_fp16_params", ())]
    shapes = {name: held.spec.shape for name, held in model.items()}
    named = grouped(inner["param_groups"], shapes, rules, where)
    for index, (group, names) in enumerate(zip(inner["param_groups"], named, strict=True)):
        if len(group["params"]) != len(names):
            raise CheckpointError(
                f"{where}: group {index} of the optimizer has {len(group['params'])} parameters, but the model has {len(names)} for it: "
                'state the parameters of each group by a rule: [optimizer] groups = ["regex of the first group", ...]'
            )
        queue = iter(mains[index] if index < len(mains) else ())
        for key, name in zip(group["params"], names, strict=True):
            if mains and dtype_of(model[name].spec.dtype).itemsize == 2:
                found.tensors[name, PARAM] = _main(next(queue, None), name, model[name], where)
            _add_states(found, name, inner["state"].get(key, {}), model[name], where)
        found.groups.append(Group(names=tuple(names), settings=_settings(group, found, names, where)))
    return found


def _main(value: Any, name: str, held: ReadableTensor, where: str) -> ReadableTensor:
    if value is None or not is_tensor(value) or value.spec.shape != held.spec.shape:
        raise CheckpointError(f"{where}: the main values of {name} are not at its place in the order of parameters")
    return value


def _settings(group: Mapping[str, Any], found: RankOptimizer, names: Sequence[str], where: str) -> dict[str, Any]:
    settings = settings_of(group, f"{where}: a group of the optimizer")
    step = settings.pop("step", None)
    if step is not None:
        for name in names:
            found.scalars.setdefault(name, {})["step"] = step
    return settings


def _add_states(found: RankOptimizer, name: str, states: Mapping[str, Any], held: ReadableTensor, where: str) -> None:
    for state, value in states.items():
        if (scalar := number(value)) is not None:
            found.scalars.setdefault(name, {})[state] = scalar
        elif is_tensor(value) and value.spec.shape == held.spec.shape:
            found.tensors[name, state] = value
        elif value is not None:
            raise CheckpointError(f"{where}: {state} of {name} does not have the parameter's shape: the order of parameters is wrong")


def merge_groups(ranks: Sequence[RankOptimizer]) -> tuple[list[Group], MegatronScalars]:
    """Merges groups and numbers of all ranks. Raises CheckpointError if ranks disagree."""
    merged: dict[int, tuple[dict[str, None], Mapping[str, Any]]] = {}
    scalars: MegatronScalars = {}
    for rank in ranks:
        for index, group in enumerate(rank.groups):
            names, settings = merged.setdefault(index, ({}, group.settings))
            if repr(dict(settings)) != repr(dict(group.settings)):
                raise CheckpointError(f"ranks disagree on the hyperparameters of group {index} of the optimizer")
            names |= dict.fromkeys(group.names)
        for name, values in rank.scalars.items():
            if scalars.setdefault(name, dict(values)) != values:
                raise CheckpointError(f"ranks disagree on {list(values)} of {name}")
    return [Group(names=tuple(names), settings=settings) for names, settings in merged.values()], scalars


def contents_of(
    tensors: OptimizerTensors,
    groups: Sequence[Group],
    scalars: MegatronScalars,
    *,
    ties: Mapping[str, str],
    extra: dict[str, Any],
    rules: Rules,
) -> Contents:
    """Returns the contents of a checkpoint with these tensors; ties to tensors that it lacks, and dropped ties, are left out."""
    specs: dict[str, dict[str, Spec]] = {}
    for (name, state), value in tensors.items():
        specs.setdefault(name, {})[state] = value.spec
    kept = [Group(names=tuple(name for name in group.names if name in specs), settings=group.settings) for group in groups]
    updated = {name for group in kept for name in group.names}
    step = extra.get("step")
    return Contents(
        tensors=specs,
        scalars={name: values for name, values in scalars.items() if name in specs},
        groups=kept,
        ties={name: target for name, target in ties.items() if target in specs and not rules.drops(name)},
        frozen=frozenset(name for name in specs if updated and name not in updated),
        step=step if type(step) is int else None,
        extra=extra,
    )
