"""Renames tensors in a checkpoint's contents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from elastic.checkpoint.state import Contents, Group


def renamed(contents: Contents, names: Mapping[str, str]) -> Contents:
    """Returns the contents with each name that is a key of `names` replaced by its value; other names stay."""
    new = lambda name: names.get(name, name)  # noqa: E731
    return replace(
        contents,
        tensors={new(name): states for name, states in contents.tensors.items()},
        scalars={new(name): values for name, values in contents.scalars.items()},
        groups=tuple(Group(names=tuple(map(new, group.names)), settings=group.settings) for group in contents.groups),
        ties={new(name): new(target) for name, target in contents.ties.items()},
        frozen=frozenset(map(new, contents.frozen)),
        buffers=frozenset(map(new, contents.buffers)),
    )
