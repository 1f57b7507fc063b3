"""The user's rules: new names, splits and merges along a dimension, tensors to leave out. Nothing is inferred from shapes.

A rules file is TOML, or the same as JSON:

    drop = ["regex of names or paths", ...]                   # applied before model and optimizer are searched
    preset = "megatron-gpt"                                   # shard rules after the stated ones; this is the default; or "none"
    [[rename]]  exact = "a.weight"  to = "b.weight"           # or regex = 'h\\.(\\d+)\\.(.*)'  to = 'layers.\\1.\\2'
    [[split]]   name = "qkv.weight"  dim = 0  widths = [64, 16, 16]  to = ["q.weight", "k.weight", ""]      # "" leaves that part out
    [[merge]]   names = ["q.weight", "k.weight"]  dim = 0  to = "qk.weight"
    [[slice]]   regex = 'h\\.(\\d+)\\.up'  dim = 0             # kept as tensor-parallel slices; see slice_rules.py
    [optimizer] groups = ["regex of the first group's names", ...]        # if the file numbers parameters;
    [optimizer] names = [["first of the first group", ...], ...]          # or all names, in the optimizer's order
    [[shard]]   regex = '.*\\.fc1\\.weight'  dim = 0  parts = [96, 96]      # Megatron: division among ranks; without dim, each has all

Splits and merges use the names after renaming.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastic.checkpoint.convert.numbered import Order
from elastic.checkpoint.convert.patterns import compiled
from elastic.checkpoint.convert.slice_rules import SliceRule, parse_slice_rule
from elastic.errors import CheckpointError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]


PRESETS = ("megatron-gpt", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rename:
    """Renames a name, or the names that a regular expression matches as a whole."""

    pattern: str
    to: str
    exact: bool = False

    def __post_init__(self) -> None:
        if not self.exact:
            compiled(self.pattern)

    def apply(self, name: str) -> str | None:
        """Returns the new name; None if the rule does not match."""
        if self.exact:
            return self.to if name == self.pattern else None
        match = re.fullmatch(self.pattern, name)
        try:
            return match.expand(self.to) if match else None
        except (re.error, IndexError) as error:
            raise CheckpointError(f"rule rename {self.pattern!r} to {self.to!r}: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Splits a tensor along a dimension into parts of stated widths (elements); an empty name leaves a part out."""

    name: str
    dim: int
    widths: tuple[int, ...]
    to: tuple[str, ...]

    def __post_init__(self) -> None:
        if (
            len(self.widths) != len(self.to)
            or not self.widths
            or any(type(width) is not int or width < 1 for width in self.widths)
            or self.dim < 0
        ):
            raise CheckpointError(f"rule split {self.name!r}: it needs one positive width per name, and a dimension that is not negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """Merges several tensors into one along a dimension."""

    names: tuple[str, ...]
    dim: int
    to: str

    def __post_init__(self) -> None:
        if len(self.names) < 2 or self.dim < 0:
            raise CheckpointError(f"rule merge to {self.to!r}: it needs at least two names, and a dimension that is not negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRule:
    """States how tensors are divided over tensor-parallel ranks: along `dim`, each of the `parts` (widths in the whole) by itself.

    Widths are in elements. dim None: every rank has the whole.
    """

    pattern: str
    dim: int | None = None
    parts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        compiled(self.pattern)
        positive = all(type(width) is int and width > 0 for width in self.parts)
        if not positive or bool(self.parts) != (self.dim is not None) or (self.dim is not None and self.dim < 0):
            raise CheckpointError(f"rule shard {self.pattern!r}: it needs a dimension and the positive widths of its parts, or neither")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """All rules of a conversion. preset: shard rules after the stated ones.

    lenient: unreadable values are listed and left out, for commands that only read; not a rule of a file.
    """

    drop: tuple[str, ...] = ()
    renames: tuple[Rename, ...] = ()
    splits: tuple[Split, ...] = ()
    merges: tuple[Merge, ...] = ()
    slices: tuple[SliceRule, ...] = ()
    order: Order = field(default_factory=Order)
    shards: tuple[ShardRule, ...] = ()
    preset: str = PRESETS[0]
    lenient: bool = False

    def __post_init__(self) -> None:
        for pattern in (*self.drop, *self.order.groups):
            compiled(pattern)
        if self.preset not in PRESETS:
            raise CheckpointError(f"there is no preset {self.preset!r}; the presets are {', '.join(PRESETS)}")

    @property
    def changes(self) -> bool:
        """Whether the rules rename, split, merge or drop tensors of an opened source."""
        return bool(self.drop or self.renames or self.splits or self.merges)

    def drops(self, name: str) -> bool:
        """Returns whether a rule leaves out a name."""
        return any(re.fullmatch(pattern, name) for pattern in self.drop)

    def renamed(self, name: str) -> str:
        """Returns the name after the first rename that matches it."""
        for rule in self.renames:
            if (new := rule.apply(name)) is not None:
                return new
        return name


def _rename(entry: Mapping[str, Any]) -> Rename:
    match entry:
        case {"exact": str(name), "to": str(to)} if len(entry) == 2:
            return Rename(pattern=name, to=to, exact=True)
        case {"regex": str(pattern), "to": str(to)} if len(entry) == 2:
            return Rename(pattern=pattern, to=to)
    raise CheckpointError(f"rule rename needs either exact or regex, and to; it is {dict(entry)}")


def _order(entry: Mapping[str, Any]) -> Order:
    if set(entry) - {"groups", "names"}:
        raise CheckpointError(f"rule optimizer can have groups and names, not {min(set(entry) - {'groups', 'names'})!r}")
    return Order(groups=tuple(entry.get("groups", ())), names=tuple(tuple(map(str, names)) for names in entry.get("names", ())))


def _shard(entry: Mapping[str, Any]) -> ShardRule:
    if unknown := set(entry) - {"regex", "dim", "parts"}:
        raise CheckpointError(f"rule shard can have regex, dim and parts, not {min(unknown)!r}")
    return ShardRule(pattern=entry["regex"], dim=entry.get("dim"), parts=tuple(entry.get("parts", ())))


def parse_rules(data: Mapping[str, Any]) -> Rules:
    """Returns the rules of a parsed file. Raises CheckpointError with an unknown or malformed entry."""
    known = ("drop", "rename", "split", "merge", "slice", "shard", "optimizer", "preset")
    if unknown := set(data) - set(known):
        raise CheckpointError(f"unknown rule {min(unknown)!r}; the rules are {', '.join(known)}")
    try:
        return Rules(
            drop=tuple(data.get("drop", ())),
            renames=tuple(_rename(entry) for entry in data.get("rename", ())),
            splits=tuple(Split(**{**entry, "widths": tuple(entry["widths"]), "to": tuple(entry["to"])}) for entry in data.get("split", ())),
            merges=tuple(Merge(**{**entry, "names": tuple(entry["names"])}) for entry in data.get("merge", ())),
            slices=tuple(parse_slice_rule(entry) for entry in data.get("slice", ())),
            order=_order(data.get("optimizer", {})),
            shards=tuple(_shard(entry) for entry in data.get("shard", ())),
            preset=data.get("preset", PRESETS[0]),
        )
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise CheckpointError(f"a rule has missing, unknown or malformed entries: {error}") from error


def load_rules(path: Path) -> Rules:
    """Reads a rules file. Raises CheckpointError."""
    try:
        text = path.read_text()
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not TOML: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: a rules file is a table with one entry for each kind of rule")
    return parse_rules(data)
