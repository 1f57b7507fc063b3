"""A source after rules: tensors renamed, split, merged or left out. Reads are still runs of the original."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from elastic.checkpoint.convert.rules import Merge, Rules, Split
from elastic.checkpoint.state import Contents, Group, Source, Spec
from elastic.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A slab `[low, low + width)` of dimension `dim` of a tensor of `shape`, which is an original (by name) or joined from some."""

    of: str | JoinedTensor
    shape: tuple[int, ...]
    dim: int
    low: int
    width: int

    def pieces(self, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """Yields `(name, start, stop)` of originals for the slab's run `[start, stop)`, in order."""
        inner = math.prod(self.shape[self.dim + 1 :])
        block, whole = self.width * inner, self.shape[self.dim] * inner
        if block == whole:
            yield from self._of(start, stop)
            return
        while start < stop:
            outer, within = divmod(start, block)
            count = min(stop - start, block - within)
            at = outer * whole + self.low * inner + within
            yield from self._of(at, at + count)
            start += count

    def _of(self, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        if isinstance(self.of, str):
            yield self.of, start, stop
        else:
            yield from self.of.pieces(start, stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinedTensor:
    """A tensor joined from slabs along a dimension."""

    spec: Spec
    dim: int
    parts: tuple[Part, ...]

    def pieces(self, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """Yields `(name, start, stop)` of originals for the run, in order."""
        if len(self.parts) == 1:
            yield from self.parts[0].pieces(start, stop)
            return
        inner = math.prod(self.spec.shape[self.dim + 1 :])
        row = self.spec.shape[self.dim] * inner
        while start < stop:
            outer, within = divmod(start, row)
            for part in self.parts:
                block = part.width * inner
                if within < block:
                    break
                within -= block
            count, begin = min(stop - start, block - within), outer * block + within
            yield from part.pieces(begin, begin + count)
            start += count


def _whole(name: str, spec: Spec) -> JoinedTensor:
    shape = spec.shape or (1,)
    return JoinedTensor(spec=spec, dim=0, parts=(Part(of=name, shape=shape, dim=0, low=0, width=shape[0]),))


RuledTensors = dict[str, dict[str, JoinedTensor]]


def _split(tensors: RuledTensors, rule: Split) -> None:
    if rule.name not in tensors:
        raise CheckpointError(f"rule split {rule.name!r}: there is no such tensor")
    states = tensors.pop(rule.name)
    for to in filter(None, rule.to):
        if to in tensors:
            raise CheckpointError(f"rule split {rule.name!r}: there is a tensor {to} already")
        tensors[to] = {}
    for state, joined in states.items():
        shape = joined.spec.shape
        if rule.dim >= len(shape) or sum(rule.widths) != shape[rule.dim]:
            raise CheckpointError(
                f"rule split {rule.name!r}: {state} has shape {list(shape)}; widths {list(rule.widths)} do not fill dimension {rule.dim}"
            )
        low = 0
        for to, width in zip(rule.to, rule.widths, strict=True):
            part = Part(of=joined, shape=shape, dim=rule.dim, low=low, width=width)
            spec = Spec(shape=(*shape[: rule.dim], width, *shape[rule.dim + 1 :]), dtype=joined.spec.dtype)
            if to:
                tensors[to][state] = JoinedTensor(spec=spec, dim=rule.dim, parts=(part,))
            low += width


def _merge(tensors: RuledTensors, rule: Merge) -> None:
    for name in rule.names:
        if name not in tensors:
            raise CheckpointError(f"rule merge to {rule.to!r}: there is no tensor {name}")
    taken = [tensors.pop(name) for name in rule.names]
    if rule.to in tensors:
        raise CheckpointError(f"rule merge to {rule.to!r}: there is such a tensor already")
    if any(set(states) != set(taken[0]) for states in taken):
        raise CheckpointError(f"rule merge to {rule.to!r}: its parts have different states")
    tensors[rule.to] = {}
    for state in taken[0]:
        pieces = [states[state] for states in taken]
        shapes = [list(piece.spec.shape) for piece in pieces]
        others = {
            (tuple(s[: rule.dim]), tuple(s[rule.dim + 1 :]), len(s), piece.spec.dtype) for s, piece in zip(shapes, pieces, strict=True)
        }
        if len(others) > 1 or rule.dim >= len(shapes[0]):
            raise CheckpointError(f"rule merge to {rule.to!r}: {state} has shapes {shapes}, which do not join along dimension {rule.dim}")
        shape = [*shapes[0]]
        shape[rule.dim] = sum(s[rule.dim] for s in shapes)
        parts = tuple(Part(of=piece, shape=piece.spec.shape, dim=rule.dim, low=0, width=piece.spec.shape[rule.dim]) for piece in pieces)
        tensors[rule.to][state] = JoinedTensor(spec=Spec(shape=tuple(shape), dtype=pieces[0].spec.dtype), dim=rule.dim, parts=parts)


def _groups(groups: Sequence[Group], names: dict[str, tuple[str, ...]]) -> tuple[Group, ...]:
    changed = []
    for group in groups:
        new = tuple(dict.fromkeys(to for name in group.names for to in names.get(name, (name,))))
        changed.append(Group(names=new, settings=group.settings))
    placed = [name for group in changed for name in group.names]
    twice = [name for name in placed if placed.count(name) > 1] if len(set(placed)) < len(placed) else []
    if twice:
        raise CheckpointError(f"rules would put {twice[0]} into two groups of the optimizer")
    return tuple(changed)


class Ruled:
    """A source after rules. Raises CheckpointError with rule and tensor if a rule does not fit."""

    def __init__(self, source: Source, rules: Rules) -> None:
        self.source, self.format = source, source.format
        old = source.contents
        renamed = {name: rules.renamed(name) for name in [*old.tensors, *old.ties] if not rules.drops(name)}
        if len(set(renamed.values())) < len(renamed):
            values = list(renamed.values())
            raise CheckpointError(f"rules rename two tensors to {next(name for name in values if values.count(name) > 1)}")
        names = {name: (renamed[name],) if name in renamed else () for name in [*old.tensors, *old.ties]}
        self.tensors: RuledTensors = {}
        for name, states in old.tensors.items():
            if name in renamed:
                self.tensors[renamed[name]] = {state: _whole(name, spec) for state, spec in states.items()}
        for split in rules.splits:
            _split(self.tensors, split)
            names = {
                name: tuple(new for to in tos for new in (filter(None, split.to) if to == split.name else (to,)))
                for name, tos in names.items()
            }
        for merge in rules.merges:
            _merge(self.tensors, merge)
            names = {name: tuple(merge.to if to in merge.names else to for to in tos) for name, tos in names.items()}
        self.contents = self._contents(old, rules, names)

    def _contents(self, old: Contents, rules: Rules, names: dict[str, tuple[str, ...]]) -> Contents:
        scalars: dict[str, dict[str, float | int | bool]] = {}
        for name, values in old.scalars.items():
            for to in names.get(name, (name,)):
                if scalars.setdefault(to, dict(values)) != dict(values):
                    raise CheckpointError(f"rules would merge parameters into {to} whose states {list(values)} differ")
        ties = {}
        for name, target in old.ties.items():
            if names[name] and len(names[target]) != 1:
                raise CheckpointError(f"{name} is tied to {target}, which the rules split or drop; drop {name} too")
            ties |= dict.fromkeys(names[name], names[target][0])
        return replace(
            old,
            tensors={name: {state: joined.spec for state, joined in states.items()} for name, states in self.tensors.items()},
            scalars=scalars,
            groups=_groups(old.groups, names),
            ties=ties,
            frozen=frozenset(to for name in old.frozen for to in names.get(name, ())),
            buffers=frozenset(to for name in old.buffers for to in names.get(name, ())),
            extra={key: value for key, value in old.extra.items() if not rules.drops(key)},
        )

    def read(self, name: str, state: str, start: int, stop: int) -> torch.Tensor:
        """Reads a run, assembled from runs of originals."""
        runs = list(self.tensors[name][state].pieces(start, stop))
        if len(runs) == 1:
            return self.source.read(runs[0][0], state, *runs[0][1:])
        dtype = getattr(torch, self.tensors[name][state].spec.dtype)
        out, position = torch.empty(stop - start, dtype=dtype), 0
        for original, low, high in runs:
            out[position : position + high - low] = self.source.read(original, state, low, high)
            position += high - low
        return out

    def close(self) -> None:
        """Closes the files."""
        self.source.close()
