"""Translates parameter names between the list of layers and checkpoints.

A model that is cut into layers is an `nn.Sequential` or a list, so its parameters are called `0.weight`, `3.attn.weight`. Programs that
open a checkpoint expect the names of the model that the layers were taken from. So names are translated when a checkpoint is written or
read, and nowhere else: digests, messages and layouts use the names in the list of layers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from elastic.checkpoint.reader import ElasticSource
from elastic.checkpoint.renaming import renamed
from elastic.checkpoint.state import Contents
from elastic.engine.partial import partial
from elastic.errors import CheckpointError, TrainerError
from elastic.worker.restore import RestoredRun, persistent_buffers

Names = nn.Module | Mapping[str, str] | Callable[[str], str]
"""The module that the layers were taken from; or a mapping of names or module prefixes to names; or a function from name to name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Naming:
    """The translation of names: `saved` maps each parameter's and persistent buffer's name in the list of layers to that in checkpoints."""

    saved: Mapping[str, str]

    @property
    def digest(self) -> str:
        """A digest of the translation, to be compared between workers."""
        return hashlib.sha256(json.dumps(sorted(self.saved.items())).encode()).hexdigest()[:16]

    @property
    def changes(self) -> bool:
        """Whether any name differs."""
        return any(own != saved for own, saved in self.saved.items())

    def outward(self, contents: Contents, runs: Iterable[RestoredRun]) -> tuple[Contents, list[RestoredRun]]:
        """Renames a save's contents and runs to the names in checkpoints."""
        return renamed(contents, self.saved), [run._replace(name=self.saved.get(run.name, run.name)) for run in runs]

    def inward(self, source: ElasticSource) -> None:
        """Renames a checkpoint's contents to the names in the list of layers, unless it was saved under these.

        Raises:
            CheckpointError: if the checkpoint has neither kind of names.
        """
        held = source.manifest.contents
        present = {*held.tensors, *held.ties}
        own = sorted(set(self.saved) - present)
        if self.changes and not set(self.saved.values()) - present:
            source.rename({saved: own for own, saved in self.saved.items()})
        elif len(own) == len(self.saved) and present:
            other = f" or {self.saved[own[0]]!r}" if self.changes else ""
            raise CheckpointError(
                f"{source.name}: its parameters have names such as {min(present)!r}, and this model's such as {own[0]!r}{other}. If they "
                "are the same parameters, pass Trainer(..., names=...): the module that the layers were taken from, or a function from "
                "this model's names to the checkpoint's"
            )


def naming_of(root: nn.Module, names: Names | None = None) -> Naming:
    """Returns the naming of `root`'s parameters and buffers; `root` is the model as the list of layers.

    `names` None: the names in the model's own `state_dict`, which a subclass of `nn.Sequential` may change.

    Raises:
        TrainerError: if a name is missing or given twice, or a new name is another parameter's name in the list of layers.
    """
    own: dict[str, torch.Tensor] = {**dict(root.named_parameters()), **dict(persistent_buffers(root))}
    if names is None:
        given = _names_in(root)
        found: dict[str, Any] = {name: given.get(id(tensor), name) for name, tensor in own.items()}
    elif isinstance(names, nn.Module):
        found = _taken_from(own, names)
    elif isinstance(names, Mapping):
        found = _listed(own, names)
    elif callable(names):
        found = {name: names(name) for name in own}
    else:
        raise TrainerError(f"names is a {type(names).__name__}; give the module that the layers were taken from, a mapping or a function")
    _check(found)
    return Naming(saved=found)


def _names_in(module: nn.Module) -> dict[int, str]:
    """Maps each tensor's `id` to its name in a module's `state_dict`; a tied tensor has the name of its parameter."""
    with partial():
        state = module.state_dict(keep_vars=True)
    found: dict[int, str] = {}
    for name, parameter in module.named_parameters():
        if state.get(name) is parameter:
            found[id(parameter)] = name
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor):
            found.setdefault(id(tensor), name)
    return found


def _taken_from(own: Mapping[str, torch.Tensor], module: nn.Module) -> dict[str, str]:
    given, kind = _names_in(module), type(module).__name__
    if strange := [name for name, tensor in own.items() if id(tensor) not in given]:
        raise TrainerError(
            f"names: {strange[0]} in the list of layers is not in the {kind} given as names. Take every layer from that module; or give "
            "a mapping or a function from the names in the list of layers"
        )
    held = {id(tensor) for tensor in own.values()}
    if missing := [name for identity, name in given.items() if identity not in held]:
        raise TrainerError(
            f"names: no layer has {missing[0]} of the {kind} given as names ({len(missing)} such names), so checkpoints would lack it. "
            "Put it into a layer; or, if it is not needed, give a mapping or a function from the names in the list of layers"
        )
    return {name: given[id(tensor)] for name, tensor in own.items()}


def _listed(own: Iterable[str], names: Mapping[str, str]) -> dict[str, str]:
    """Looks up each name, or else its longest module prefix, in the mapping."""
    used: set[str] = set()
    found: dict[str, Any] = {}
    for name in own:
        parts = name.split(".")
        key = next((head for end in range(len(parts), 0, -1) if (head := ".".join(parts[:end])) in names), None)
        found[name] = name
        if key is not None:
            used.add(key)
            rest = name[len(key) :]
            found[name] = f"{names[key]}{rest}" if rest else names[key]
    if unused := sorted(set(map(str, names)) - used):
        raise TrainerError(f"names: the model has no {unused[0]}; it has names such as {next(iter(found))}")
    return found


def _check(found: Mapping[str, Any]) -> None:
    before: dict[str, str] = {}
    for own, saved in found.items():
        if not isinstance(saved, str) or not saved or saved == "__metadata__" or "/" in saved:
            raise TrainerError(f"names: {own} would be called {saved!r} in checkpoints; a name is text without a slash")
        if saved in before:
            raise TrainerError(f"names: {before[saved]} and {own} would both be called {saved}; every parameter needs a different name")
        before[saved] = own
    if set(found) == set(before) and any(own != saved for own, saved in found.items()):
        own = next(own for own, saved in found.items() if own != saved)
        raise TrainerError(
            f"names: {own} would be called {found[own]}, which is another parameter's name in the list of layers; checkpoints with and "
            "without these names could not be distinguished. Choose names that the list of layers does not have"
        )
