"""The arguments of a model's blocks: which are the state that one block hands to the next, and which all get from the model's forward.

A call's arguments are named: a positional one by its place (`0`, `1`), the others by their keyword.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from elastic.engine.boundary import flatten
from elastic.errors import TrainerError

Arguments = dict[str, Any]


def named(positional: Sequence[Any], keywords: Mapping[str, Any]) -> Arguments:
    """Returns a call's arguments by name."""
    return {**{str(place): value for place, value in enumerate(positional)}, **keywords}


def call(arguments: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Returns positional and keyword arguments; the inverse of `named`."""
    positional = sorted((name for name in arguments if name.isdigit()), key=int)
    return [arguments[name] for name in positional], {name: value for name, value in arguments.items() if not name.isdigit()}


def tensors_in(value: Any) -> list[torch.Tensor] | None:
    """Returns the tensors of a value that may cross a boundary; None for any other value."""
    try:
        return flatten(value, "")[1]
    except TrainerError:
        return None


def part_of(output: Any, part: int | None) -> Any:
    """Returns a part of a block's output; None: all of it."""
    return output if part is None else output[part]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """How the arguments of blocks come about.

    `carried`: an argument of each block that is a part of the output of the block before. `fixed`: those of each block that are neither
    tensors nor None, with their values. All others are `passed`: tensors, or None, that the model's forward computes for each
    micro-batch; `constant` are those that no gradient flows through.
    """

    carried: Mapping[str, int | None]
    fixed: tuple[Arguments, ...]
    passed: tuple[tuple[str, ...], ...]
    constant: frozenset[str]

    @classmethod
    def of(cls, calls: Sequence[Arguments], outputs: Sequence[Any]) -> Wiring:
        """Reads the calls of all blocks, in order, and their outputs.

        Raises:
            ValueError: if a block does not get what the block before returned, or an argument is of another kind; the message is a reason.
        """
        carried = _carried(calls, outputs)
        fixed: list[Arguments] = []
        passed: list[tuple[str, ...]] = []
        for block, arguments in enumerate(calls):
            other = {name: value for name, value in arguments.items() if name not in carried}
            fixed.append({name: value for name, value in other.items() if tensors_in(value) is None})
            for name, value in fixed[-1].items():
                if not _plain(value):
                    raise ValueError(f"block {block} gets {name}, a {type(value).__name__}, which cannot cross a layer boundary")
            passed.append(tuple(name for name in other if name not in fixed[-1]))
        moving = {name for arguments in calls for name, value in arguments.items() if any(t.requires_grad for t in tensors_in(value) or ())}
        return cls(
            carried=carried,
            fixed=tuple(fixed),
            passed=tuple(passed),
            constant=frozenset(name for names in passed for name in names) - moving,
        )

    def check(self, block: int, arguments: Arguments) -> None:
        """Raises ValueError, with a reason, if a block's arguments are other ones than in the run that the wiring was read from."""
        known = {*self.carried, *self.fixed[block], *self.passed[block]}
        if changed := known.symmetric_difference(arguments):
            raise ValueError(f"block {block} has the argument {min(changed)} for some micro-batches only")
        for name, value in self.fixed[block].items():
            if arguments[name] != value:
                raise ValueError(f"block {block} gets {name}={arguments[name]!r} for this micro-batch, and got {value!r} when it was cut")

    def pack(self, calls: Sequence[Arguments]) -> Arguments:
        """Returns the passed arguments of all blocks, each value once: by name if all blocks have it, else by `name@block,block`."""
        packed: Arguments = {}
        for name in dict.fromkeys(name for names in self.passed for name in names):
            users = [block for block, names in enumerate(self.passed) if name in names]
            groups = _grouped(users, [calls[block][name] for block in users])
            for blocks, value in groups:
                packed[name if len(groups) == 1 else f"{name}@{','.join(map(str, blocks))}"] = value
        return packed

    def unpack(self, block: int, packed: Mapping[str, Any]) -> Arguments:
        """Returns the arguments of a block but for the carried ones."""
        found = dict(self.fixed[block])
        for key, value in packed.items():
            name, _, blocks = key.partition("@")
            if name in self.passed[block] and (not blocks or str(block) in blocks.split(",")):
                found[name] = value
        return found


def _carried(calls: Sequence[Arguments], outputs: Sequence[Any]) -> dict[str, int | None]:
    found: dict[str, int | None] | None = None
    for block, (arguments, before) in enumerate(zip(calls[1:], outputs, strict=False), start=1):
        parts = {None: before} if isinstance(before, torch.Tensor) else dict(enumerate(before)) if isinstance(before, tuple | list) else {}
        places = {id(value): part for part, value in parts.items() if isinstance(value, torch.Tensor)}
        own = {name: places[id(value)] for name, value in arguments.items() if id(value) in places}
        if not own:
            raise ValueError(f"block {block} does not get what block {block - 1} returns: the model's forward does something in between")
        if found is not None and own != found:
            raise ValueError(f"block {block} gets other parts of what the block before returns ({', '.join(own)}) than block 1 does")
        found = own
    if found is None:
        raise ValueError("it has one block only")
    if missing := next((name for name in found if name not in calls[0]), None):
        raise ValueError(f"block 0 has no argument {missing}, which the others get from the block before")
    return found


def _grouped(users: Iterable[int], values: Iterable[Any]) -> list[tuple[list[int], Any]]:
    groups: dict[Any, tuple[list[int], Any]] = {}
    for block, value in zip(users, values, strict=True):
        structure, tensors = flatten(value, f"an argument of block {block}")
        groups.setdefault((repr(structure), *map(id, tensors)), ([], value))[0].append(block)
    return list(groups.values())


def _plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device | torch.Size)
