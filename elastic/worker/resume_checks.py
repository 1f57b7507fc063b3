"""Compares the training that saved a checkpoint with the training that is about to resume from it. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from elastic.errors import CheckpointError

_BITS = {
    "batch_size": "every step has other samples",
    "micro_batch_size": "sums are added in another order",
    "seed": "samples come in another order, and dropout draws other numbers",
    "samples": "samples come in another order",
}
"""Settings that may differ, each with the effect of a difference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRecord:
    """The values besides the model that identify a training; stored in the `extra` of each of its checkpoints.

    `optimizer` and `scheduler` are class names, `initial` is the digest of the training's initial parameters, `settings` has the keys of
    `_BITS`, and `group_values` the `repr` of each parameter group's settings in the script. An empty string or a missing key stands for an
    unknown value.
    """

    optimizer: str = ""
    scheduler: str = ""
    initial: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    group_values: Sequence[Mapping[str, str]] = ()

    def to_json(self) -> dict[str, Any]:
        """For a manifest; `from_json` is the inverse."""
        return {
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "initial": self.initial,
            "settings": dict(self.settings),
            "group_values": [dict(group) for group in self.group_values],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainingRecord:
        """Reads a record; values that an older version did not write stay unknown."""
        return cls(
            optimizer=str(data.get("optimizer", "")),
            scheduler=str(data.get("scheduler", "")),
            initial=str(data.get("initial", "")),
            settings=dict(data.get("settings", {})),
            group_values=[dict(group) for group in data.get("group_values", [])],
        )


def check_same_training(name: str, saved: TrainingRecord, own: TrainingRecord) -> list[str]:
    """Returns a sentence for the user for each allowed difference between this training and that of checkpoint `name`.

    Raises:
        CheckpointError: if the checkpoint is another training's, or its optimizer or scheduler is of another class.
    """
    began_otherwise = bool(saved.initial) and saved.initial != own.initial
    seeds = saved.settings.get("seed", own.settings.get("seed")), own.settings.get("seed")
    if began_otherwise and seeds[0] != seeds[1]:
        raise CheckpointError(
            f"{name} belongs to another training: it began with seed={seeds[0]} and other initial parameters, but this one has "
            f"seed={seeds[1]}. Give this training its own directory, or the seed of the training that it should continue"
        )
    if saved.optimizer and saved.optimizer != own.optimizer:
        raise CheckpointError(
            f"{name} was trained with {saved.optimizer}, but this job has {own.optimizer}, which cannot load that state. Use "
            f"{saved.optimizer}; or load the checkpoint's weights into the model and give the training its own directory"
        )
    if own.scheduler and saved.scheduler and saved.scheduler != own.scheduler:
        raise CheckpointError(
            f"{name} was trained with the scheduler {saved.scheduler}, but this job has {own.scheduler}, which cannot load that state. "
            f"Use {saved.scheduler}; or load the checkpoint's weights into the model and give the training its own directory"
        )
    told = []
    if began_otherwise:
        told.append(f"{name} belongs to a training that began with other initial parameters: a new training needs its own directory")
    if saved.scheduler and not own.scheduler:
        told.append(f"{name} was trained with the scheduler {saved.scheduler}, but this job has none: learning rates stay as saved")
    for key, effect in _BITS.items():
        if key in saved.settings and saved.settings[key] != own.settings.get(key):
            told.append(f"{name} was trained with {key}={saved.settings[key]}, but this job has {own.settings.get(key)}: {effect}")
    return told


def changed_values(name: str, saved: TrainingRecord, own: TrainingRecord, sources: Sequence[int | None]) -> list[str]:
    """Returns a sentence for each parameter group's setting that this script gives another value than the script that began the training.

    `sources` has, for each of this optimizer's groups, the index of the checkpoint's group that it loads.
    """
    pairs = [
        (index, saved.group_values[source], own.group_values[index])
        for index, source in enumerate(sources)
        if source is not None and source < len(saved.group_values) and index < len(own.group_values)
    ]
    return [
        f"{key} of parameter group {index} was {before[key]} in the script that began {name} and is {now[key]} in this one: the saved "
        "value is used; change it in the loop, or in optimizer.param_groups after Trainer(...)"
        for index, before, now in pairs
        for key in before
        if key in now and before[key] != now[key]
    ]


def matched_groups(
    name: str, saved: Sequence[Collection[str]], own: Sequence[Collection[str]], frozen: Collection[str]
) -> list[int | None]:
    """Returns, for each of this optimizer's parameter groups, the index of the checkpoint's group that shares its parameters.

    None: all parameters of the group are new to the optimizer (they were frozen), so it keeps its own settings. `frozen` are the
    parameters that are no longer trained.

    Raises:
        CheckpointError: if parameters are grouped differently.
    """
    place = {parameter: index for index, group in enumerate(saved) for parameter in group}
    found: list[int | None] = []
    for index, group in enumerate(own):
        sources = {place[parameter] for parameter in group if parameter in place}
        if len(sources) > 1 or sources & {known for known in found if known is not None}:
            raise _grouped_otherwise(name, saved, own, index)
        found.append(next(iter(sources), None))
    left = [group for index, group in enumerate(saved) if index not in found and any(parameter not in frozen for parameter in group)]
    if left:
        raise _grouped_otherwise(name, saved, own, None)
    return found


def _grouped_otherwise(name: str, saved: Sequence[Collection[str]], own: Sequence[Collection[str]], index: int | None) -> CheckpointError:
    which = "" if index is None else f"; parameter group {index} ({_named(own[index])}) is neither one of them nor a part of one"
    return CheckpointError(
        f"{name} was saved by an optimizer with {len(saved)} parameter group{'s' * (len(saved) != 1)} "
        f"({'; '.join(_named(group) for group in saved)}), and this one has {len(own)}{which}: group the parameters as in the checkpoint"
    )


def _named(group: Collection[str]) -> str:
    names = list(group)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
