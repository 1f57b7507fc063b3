"""Rules that a user states: other names, splits and merges along a dimension, what to leave out. Nothing is inferred from shapes.

A rules file is TOML, or the same as JSON:

    drop = ["regex of names or paths", ...]                   # before model and optimizer are looked for
    preset = "megatron-gpt"                                   # shards that follow those that are stated; the default; or "none"
    [[rename]]  exact = "a.weight"  to = "b.weight"           # or regex = 'h\\.(\\d+)\\.(.*)'  to = 'layers.\\1.\\2'
    [[split]]   name = "qkv.weight"  dim = 0  widths = [64, 16, 16]  to = ["q.weight", "k.weight", ""]      # "" leaves that part out
    [[merge]]   names = ["q.weight", "k.weight"]  dim = 0  to = "qk.weight"
    [[slice]]   regex = 'h\\.(\\d+)\\.up'  dim = 0             # kept as tensor-parallel slices; see slice_rules.py
    [optimizer] groups = ["regex of the first group's names", ...]        # where the file numbers parameters;
    [optimizer] names = [["first of the first group", ...], ...]          # or all of them, in the optimizer's order
    [[shard]]   regex = '.*\\.fc1\\.weight'  dim = 0  parts = [96, 96]      # Megatron: how ranks divide it; no dim: each has it whole

Splits and merges are of names after renaming.
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
    """A name, or a regular expression that matches all of one, and what it becomes."""

    pattern: str
    to: str
    exact: bool = False

    def __post_init__(self) -> None:
        if not self.exact:
            compiled(self.pattern)

    def apply(self, name: str) -> str | None:
        """The new name, None if the rule is not about it."""
        if self.exact:
            return self.to if name == self.pattern else None
        match = re.fullmatch(self.pattern, name)
        try:
            return match.expand(self.to) if match else None
        except (re.error, IndexError) as error:
            raise CheckpointError(f"rule rename {self.pattern!r} to {self.to!r}: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A tensor that becomes several along a dimension, of stated widths in elements; an empty name leaves a part out."""

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
            raise CheckpointError(f"rule split {self.name!r}: it takes one positive width per name, and a dimension that is not negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """Several tensors that become one along a dimension."""

    names: tuple[str, ...]
    dim: int
    to: str

    def __post_init__(self) -> None:
        if len(self.names) < 2 or self.dim < 0:
            raise CheckpointError(f"rule merge to {self.to!r}: it takes at least two names, and a dimension that is not negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRule:
    """How tensors are divided over tensor-parallel ranks: along `dim`, each of the `parts` (widths in the whole, elements) by itself.

    dim None: every rank has the whole.
    """

    pattern: str
    dim: int | None = None
    parts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        compiled(self.pattern)
        positive = all(type(width) is int and width > 0 for width in self.parts)
        if not positive or bool(self.parts) != (self.dim is not None) or (self.dim is not None and self.dim < 0):
            raise CheckpointError(f"rule shard {self.pattern!r}: it takes a dimension and the positive widths of its parts, or neither")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """All rules of a conversion. preset: shards that follow those that are stated.

    lenient: what cannot be read is listed and left out, for commands that only look; not a rule of a file.
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
            raise CheckpointError(f"there is no preset {self.preset!r}; there are {', '.join(PRESETS)}")

    @property
    def changes(self) -> bool:
        """Whether names or tensors become others, or are left out, after a source is opened."""
        return bool(self.drop or self.renames or self.splits or self.merges)

    def drops(self, name: str) -> bool:
        """Whether a name is to be left out."""
        return any(re.fullmatch(pattern, name) for pattern in self.drop)

    def renamed(self, name: str) -> str:
        """The name after the first rule that is about it."""
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
    raise CheckpointError(f"a rename has either exact or regex, and to; it is {dict(entry)}")


def _order(entry: Mapping[str, Any]) -> Order:
    if set(entry) - {"groups", "names"}:
        raise CheckpointError("rule optimizer has groups or names")
    return Order(groups=tuple(entry.get("groups", ())), names=tuple(tuple(map(str, names)) for names in entry.get("names", ())))


def _shard(entry: Mapping[str, Any]) -> ShardRule:
    if unknown := set(entry) - {"regex", "dim", "parts"}:
        raise CheckpointError(f"rule shard has regex, dim and parts, not {min(unknown)!r}")
    return ShardRule(pattern=entry["regex"], dim=entry.get("dim"), parts=tuple(entry.get("parts", ())))


def parse_rules(data: Mapping[str, Any]) -> Rules:
    """Rules of a parsed file. Raises CheckpointError naming what is unknown."""
    known = ("drop", "rename", "split", "merge", "slice", "shard", "optimizer", "preset")
    if unknown := set(data) - set(known):
        raise CheckpointError(f"unknown rule {min(unknown)!r}; there are {', '.join(known)}")
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
        raise CheckpointError(f"a rule lacks something, or has too much: {error}") from error


def load_rules(path: Path) -> Rules:
    """Reads a rules file. Raises CheckpointError."""
    try:
        text = path.read_text()
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is no TOML: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: rules are a table by kind of rule")
    return parse_rules(data)
