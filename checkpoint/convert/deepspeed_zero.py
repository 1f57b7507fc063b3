"""Reads the `*_optim_states.pt` shards of ZeRO stages 1, 2 and 3: maps runs of shards to runs of tensors.

From DeepSpeed 0.19.8. Stages 1 and 2 (`runtime/zero/stage_1_and_2.py`, `state_dict`; `runtime/bf16_optimizer.py`): a group's
parameters are concatenated in one vector, in the order of `param_shapes`, with `param_alignment_paddings` between them; rank r
holds the r-th equal part. Padding at the end is stripped from `single_partition_of_fp32_groups` (not by the bf16 optimizer), not from the
base optimizer's state. `param_slice_mappings` are not used: with `round_robin_gradients` they name other parameters than those whose
values they point at (`_link_all_hp_params` uses the order before round-robin). Stage 3 (`runtime/zero/stage3.py`, `_rigid_state_dict`):
every parameter is partitioned over the ranks by itself, and a rank's parts are concatenated, per sub-group;
`param_groups[g]["params"]` lists the sub-groups of group g.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from elastic.checkpoint.convert.deepspeed_models import Models, Opening, Shapes, read_models
from elastic.checkpoint.convert.deepspeed_pieces import PiecedTensor, PieceSource, TensorPiece, specs
from elastic.checkpoint.convert.optimizer import settings_of
from elastic.checkpoint.pickles import number
from elastic.checkpoint.state import PARAM, Contents, Group, Spec
from elastic.checkpoint.stored import ReadableTensor, is_tensor
from elastic.errors import CheckpointError
from elastic.layout.runs import shared

_SHARD = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


def read_zero(opening: Opening) -> PieceSource:
    """Opens the directory of a ZeRO checkpoint. Raises CheckpointError with file and reason."""
    models = read_models(opening)
    collected = _Collected(opening)
    stage = 0
    for mp, shapes in models.shapes.items():
        shards = _shards(opening, mp)
        stage = max(stage, int(number(shards[0].get("zero_stage", 1)) or 1))
        collected.add(shapes, shards, stage == 3)
    return collected.source(models, stage)


def _shards(opening: Opening, mp: int) -> list[Mapping[str, Any]]:
    """Loads the optimizer's state of every data-parallel rank."""
    folder = opening.folder
    matches = [(match, path) for path in folder.iterdir() if (match := _SHARD.fullmatch(path.name))]
    files = {int(match[1]): path for match, path in matches if int(match[2]) == mp}
    if sorted(files) != list(range(len(files))) or not files:
        raise CheckpointError(f"{folder}: shards of the optimizer are missing for model-parallel rank {mp}; found ranks {sorted(files)}")
    shards = [opening.load(files[rank]).get("optimizer_state_dict") for rank in range(len(files))]
    counts = shards[0].get("partition_count", len(files))
    for count in counts if isinstance(counts, list) else [counts]:
        if count != len(files):
            raise CheckpointError(f"{folder}: it was saved by {count} ranks, but has shards of {len(files)}")
    return shards


class _Collected:
    """The tensors, numbers and groups of all shards, by parameter name."""

    def __init__(self, opening: Opening) -> None:
        self.folder, self.drops, self.files = opening.folder, opening.drops, opening.files
        self.found: dict[str, dict[str, PiecedTensor]] = {}
        self.scalars: dict[str, dict[str, float | int | bool]] = {}
        self.groups: dict[int, tuple[list[str], dict[str, Any]]] = {}

    def add(self, shapes: Shapes, shards: Sequence[Mapping[str, Any]], third: bool) -> None:
        flats = [shard["fp32_flat_groups" if third else "single_partition_of_fp32_groups"] for shard in shards]
        bases = [shard["optimizer_state_dict" if third else "base_optimizer_state"] for shard in shards]
        if any(len(flat) != len(shapes) for flat in flats):
            raise CheckpointError(f"{self.folder}: param_shapes has {len(shapes)} groups, the shards have {[len(flat) for flat in flats]}")
        for index, names in enumerate(shapes):
            held = {PARAM: [flat[index] for flat in flats], **self._tensors(bases, index)}
            paddings = shards[0].get("param_alignment_paddings")
            for name, pieces in self._pieces(names, held, third, paddings[index] if paddings else None):
                if name not in self.found:
                    self.found[name] = pieces
                    self.scalars[name] = self._numbers(bases, index)
        self._add_groups(shapes, bases[0])

    def _pieces(
        self, names: Mapping[str, Sequence[int]], held: Mapping[str, Sequence[ReadableTensor]], third: bool, paddings: Sequence[int] | None
    ) -> Iterator[tuple[str, dict[str, PiecedTensor]]]:
        position = 0
        lengths = [one.spec.elements for one in held[PARAM]]
        for number_, (name, shape) in enumerate(names.items()):
            size = math.prod(shape)
            parts = _third(size, position, len(lengths)) if third else _flat(position, size, lengths)
            if not self.drops(name):
                yield name, {state: self._joined(f"{name} {state}", shape, parts, shards) for state, shards in held.items()}
            position += -(-size // len(lengths)) if third else size + (paddings[number_] if paddings else 0)
        if third and any(length != position for length in lengths):
            raise CheckpointError(f"{self.folder}: a sub-group's shards have {lengths} elements, its parameters need {position} each")

    def _joined(
        self, what: str, shape: Sequence[int], parts: Sequence[tuple[int, int, int, int]], held: Sequence[ReadableTensor]
    ) -> PiecedTensor:
        pieces = tuple(TensorPiece(start=start, stop=stop, held=held[rank], at=at) for start, stop, rank, at in parts)
        return PiecedTensor(what=f"{self.folder}: {what}", spec=Spec(shape=tuple(shape), dtype=held[0].spec.dtype), pieces=pieces)

    def _state(self, base: Any, index: int) -> Mapping[str, Any]:
        states = base if isinstance(base, list) else base["state"]
        return states[index] if isinstance(states, list) else states.get(index, {})

    def _tensors(self, bases: Sequence[Any], index: int) -> dict[str, list[ReadableTensor]]:
        states = [self._state(base, index) for base in bases]
        found: dict[str, list[ReadableTensor]] = {}
        for key, value in states[0].items():
            if number(value) is None and value is not None:
                if not all(is_tensor(state.get(key)) and len(state[key].spec.shape) == 1 for state in states):
                    raise CheckpointError(f"{self.folder}: the optimizer's state {key!r} is neither a number nor a flat vector")
                found[key] = [state[key] for state in states]
        return found

    def _numbers(self, bases: Sequence[Any], index: int) -> dict[str, float | int | bool]:
        found: dict[str, float | int | bool] = {}
        for key, value in self._state(bases[0], index).items():
            if (scalar := number(value)) is not None:
                if any(number(self._state(base, index).get(key)) != scalar for base in bases):
                    raise CheckpointError(f"{self.folder}: ranks disagree on {key!r} of group {index}")
                found[key] = scalar
        return found

    def _add_groups(self, shapes: Shapes, base: Any) -> None:
        listed = base["param_groups"] if isinstance(base, dict) else []
        for index, settings in enumerate(listed):
            names, _ = self.groups.setdefault(index, ([], settings_of(settings, f"group {index}")))
            names.extend(name for flat in settings["params"] for name in shapes[flat] if name not in names and not self.drops(name))

    def source(self, models: Models, stage: int) -> PieceSource:
        found = {**self.found, **{name: {PARAM: pieces} for name, pieces in models.fixed.items()}}
        for names, settings in self.groups.values():
            if (step := settings.get("step")) is not None:
                for name in names:
                    self.scalars[name].setdefault("step", step)
        contents = Contents(
            tensors=specs(found),
            scalars={name: numbers for name, numbers in self.scalars.items() if numbers},
            groups=tuple(Group(names=tuple(names), settings=settings) for names, settings in self.groups.values()),
            ties=models.ties,
            frozen=models.frozen,
            buffers=models.buffers,
            step=models.step,
            extra={**models.extra, "deepspeed": {**models.extra.get("deepspeed", {}), "zero_stage": stage}},
        )
        return PieceSource("deepspeed", contents, found, self.files)


def _third(size: int, at: int, ranks: int) -> list[tuple[int, int, int, int]]:
    """Returns `(start, stop, rank, at)` for each part of a parameter that stage 3 partitions by itself."""
    each = -(-size // ranks)
    return [(rank * each, min(size, (rank + 1) * each), rank, at) for rank in range(ranks) if rank * each < size]


def _flat(position: int, size: int, lengths: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Returns `(start, stop, rank, at)` for each part of a run of a vector that ranks hold in parts of these lengths."""
    parts: list[tuple[int, int, int, int]] = []
    first = 0
    for rank, length in enumerate(lengths):
        if both := shared((position, position + size), (first, first + length)):
            low, high = both
            parts.append((low - position, high - position, rank, low - first))
        first += length
    return parts
