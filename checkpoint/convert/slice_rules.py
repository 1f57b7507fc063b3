"""Rules for tensors to keep as tensor-parallel slices. A tensor that no rule matches stays whole.

In a rules file:

    [[slice]]  regex = '.*\\.mlp\\.down\\.weight'  dim = 1          # or exact = "name"; divided equally among the ranks
               parts = [64, 16, 16]                             # of a fused tensor, each divided separately; or a number of equal ones
               widths = [[40, 24], [10, 6], [10, 6]]            # for each part, each rank's width, if shares are not equal
               unit = 16                                        # widths are multiples of it: a head is not cut
               padded = 50304                                   # padded with zeros to this extent in all
               multiple = 128                                   # or until each rank has a multiple of this; the last ranks have the zeros
               whole = ["exp_avg_sq_row"]                       # states that are not sliced, regular expressions
               preset = "qkv"                                   # a common block, instead of parts and unit

Presets: `qkv` with `heads`, `kv_heads` and `head_dim`: query, key and value, one after another, cut at heads. `gate_up`: two equal
parts. `vocab` with `padded` or `multiple`. `dim` is 0 by default. An optimizer's states are sliced like their parameter.
The first rule that matches a name counts. Names are those after all other rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from elastic.checkpoint.convert.patterns import compiled
from elastic.checkpoint.slices import Slicing
from elastic.checkpoint.state import PARAM, Contents
from elastic.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceRule:
    """States how tensors are divided whose name is `pattern` or is matched by it as a whole. `parts`: sizes, or a number of equal ones.

    `widths[i][r]` is rank `r`'s width of part `i`, None: equal shares. `padded`: extent of all ranks together. `multiple`: for each rank.
    """

    pattern: str
    exact: bool = False
    dim: int = 0
    parts: int | tuple[int, ...] = 1
    widths: tuple[tuple[int, ...], ...] | None = None
    unit: int = 1
    padded: int | None = None
    multiple: int | None = None
    whole: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for pattern in (*self.whole, *(() if self.exact else (self.pattern,))):
            compiled(pattern)
        sizes = (self.parts,) if isinstance(self.parts, int) else self.parts
        counts = [*sizes, self.unit, *(pad for pad in (self.padded, self.multiple) if pad is not None)]
        if not sizes or any(type(count) is not int or count < 1 for count in counts) or type(self.dim) is not int or self.dim < 0:
            self._refuse("parts, unit, padded and multiple must be positive numbers, and the dimension must not be negative")
        if self.widths is not None and any(type(width) is not int or width < 0 for part in self.widths for width in part):
            self._refuse("widths must be lists of numbers that are not negative, one list for each part")
        pads = self.padded is not None, self.multiple is not None
        if all(pads) or (any(pads) and (self.parts != 1 or self.widths is not None or self.unit != 1)):
            self._refuse("padded and multiple exclude each other, and need one part in equal shares, without widths and unit")

    def _refuse(self, reason: str) -> NoReturn:
        raise CheckpointError(f"rule slice {self.pattern!r}: {reason}")

    def matches(self, name: str) -> bool:
        """Returns whether the rule matches a name."""
        return name == self.pattern if self.exact else re.fullmatch(self.pattern, name) is not None

    def keeps_whole(self, state: str) -> bool:
        """Returns whether a state is not sliced."""
        return any(re.fullmatch(pattern, state) for pattern in self.whole)

    def slicing(self, what: str, shape: Sequence[int], ranks: int) -> Slicing:
        """Returns the slicing of a tensor of `shape`, named `what` in messages. Raises CheckpointError if the rule does not fit."""
        if self.dim >= len(shape):
            self._refuse(f"{what} of shape {list(shape)} has no dimension {self.dim}")
        try:
            if self.padded is not None or self.multiple is not None:
                return self._padded(shape[self.dim], ranks)
            slicing = Slicing(dim=self.dim, widths=self._widths(shape[self.dim], ranks))
            slicing.check(shape)
        except CheckpointError as error:
            self._refuse(f"{what} of shape {list(shape)}: {error}")
        return slicing

    def _widths(self, extent: int, ranks: int) -> tuple[tuple[int, ...], ...]:
        parts = self._parts(extent)
        if self.widths is None:
            for part in parts:
                if part % (self.unit * ranks):
                    units = f" in units of {self.unit}" if self.unit > 1 else ""
                    raise CheckpointError(f"its part of {part} cannot be divided equally among {ranks} ranks{units}; state widths")
            return tuple((part // ranks,) * ranks for part in parts)
        if [sum(part) for part in self.widths] != list(parts) or any(len(part) != ranks for part in self.widths):
            raise CheckpointError(
                f"widths {[list(part) for part in self.widths]} do not divide its parts of {list(parts)} among {ranks} ranks"
            )
        if any(width % self.unit for part in self.widths for width in part):
            raise CheckpointError(f"widths {[list(part) for part in self.widths]} are not all multiples of {self.unit}")
        return self.widths

    def _parts(self, extent: int) -> tuple[int, ...]:
        if not isinstance(self.parts, int):
            if sum(self.parts) != extent:
                raise CheckpointError(f"parts of {list(self.parts)} do not fill its dimension {self.dim}")
            return self.parts
        if extent % self.parts:
            raise CheckpointError(f"its dimension {self.dim} is not {self.parts} equal parts")
        return (extent // self.parts,) * self.parts

    def _padded(self, extent: int, ranks: int) -> Slicing:
        step = ranks * (self.multiple or 1)
        total = -(-extent // step) * step if self.padded is None else self.padded
        if total < extent or total % ranks:
            raise CheckpointError(f"{extent} cannot be padded to {total} and divided among {ranks} ranks")
        each = total // ranks
        widths = tuple(max(0, min(each, extent - rank * each)) for rank in range(ranks))
        return Slicing(dim=self.dim, widths=(widths,), padded=(each,) * ranks)


def _qkv(*, heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    return {"parts": [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], "unit": head_dim}


def _gate_up() -> dict[str, Any]:
    return {"parts": 2}


def _vocab(*, padded: int | None = None, multiple: int | None = None) -> dict[str, Any]:
    if padded is None and multiple is None:
        raise CheckpointError("preset vocab needs padded or multiple")
    return {"padded": padded, "multiple": multiple}


PRESETS: Mapping[str, Callable[..., dict[str, Any]]] = {"qkv": _qkv, "gate_up": _gate_up, "vocab": _vocab}
_COMMON = {"exact", "regex", "dim", "widths", "whole"}


def parse_slice_rule(entry: Mapping[str, Any]) -> SliceRule:
    """Returns a rule of a parsed file. Raises CheckpointError, or TypeError for a malformed value."""
    fields = dict(entry)
    if ("exact" in fields) == ("regex" in fields) or not isinstance(pattern := fields.get("exact", fields.get("regex")), str):
        raise CheckpointError(f"rule slice needs either exact or regex; it is {fields}")
    if (name := fields.pop("preset", None)) is not None:
        if name not in PRESETS:
            raise CheckpointError(f"rule slice {pattern!r}: there is no preset {name!r}; the presets are {', '.join(PRESETS)}")
        try:
            preset = PRESETS[name](**{key: fields.pop(key) for key in set(fields) - _COMMON})
        except TypeError as error:
            raise CheckpointError(f"rule slice {pattern!r}: preset {name}: {error}") from error
        fields |= preset
    if unknown := set(fields) - _COMMON - {"parts", "unit", "padded", "multiple"}:
        raise CheckpointError(f"rule slice {pattern!r} has the unknown entry {min(unknown)!r}")
    exact = fields.pop("exact", None) is not None
    fields.pop("regex", None)
    for key in ("parts", "whole"):
        if isinstance(fields.get(key), list):
            fields[key] = tuple(fields[key])
    if fields.get("widths") is not None:
        fields["widths"] = tuple(tuple(part) for part in fields["widths"])
    return SliceRule(pattern=pattern, exact=exact, **fields)


def slicings_of(contents: Contents, rules: Sequence[SliceRule], ranks: int) -> dict[tuple[str, str], Slicing]:
    """Returns the slicing among `ranks` ranks of each tensor that a rule matches, by name and state; nothing for one rank.

    Raises CheckpointError with rule and tensor if a rule does not fit, or if a rule slices nothing.
    """
    if ranks == 1:
        return {}
    found: dict[tuple[str, str], Slicing] = {}
    used: set[SliceRule] = set()
    for name, states in contents.tensors.items():
        rule = next((rule for rule in rules if rule.matches(name)), None)
        if rule is None:
            continue
        used.add(rule)
        for state, spec in states.items():
            if rule.keeps_whole(state):
                continue
            what = name if state == PARAM else f"{state} of {name}"
            if spec.shape != states.get(PARAM, spec).shape:
                raise CheckpointError(
                    f"rule slice {rule.pattern!r}: {what} has shape {list(spec.shape)}, which differs from that of {name}; "
                    f"keep it whole by `whole = [{state!r}]`"
                )
            found[name, state] = rule.slicing(what, spec.shape, ranks)
    for rule in rules:
        if rule not in used:
            tied = next((f"; {name} is tied to {base}: slice {base}" for name, base in contents.ties.items() if rule.matches(name)), "")
            raise CheckpointError(f"rule slice {rule.pattern!r} matches no tensor, or only tensors that an earlier rule slices{tied}")
    return found
