"""Removes checkpoints that no policy keeps: never the last good one, and no file that a save did not make."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Protocol

from elastic.checkpoint.commit import TOKEN, nameless, put_token, remove_all
from elastic.checkpoint.directory import found
from elastic.checkpoint.manifest import MANIFEST, Manifest
from elastic.checkpoint.reader import ElasticSource
from elastic.checkpoint.store import Store
from elastic.errors import CheckpointError

_log = logging.getLogger(__name__)


class RetentionPolicy(Protocol):
    """One reason to keep a checkpoint."""

    def keeps(self, step: int, newer: int) -> bool:
        """Returns whether to keep the checkpoint of `step`; `newer` good checkpoints are newer than it."""
        ...


@dataclass(frozen=True, slots=True)
class KeepLast:
    """Keeps the newest `count`."""

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise CheckpointError(f"the number of checkpoints to keep is {self.count}; it must be at least 1")

    def keeps(self, step: int, newer: int) -> bool:
        return newer < self.count


@dataclass(frozen=True, slots=True)
class KeepEvery:
    """Keeps the checkpoints of steps that are multiples of `steps`."""

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise CheckpointError(f"checkpoints of every {self.steps} steps cannot be kept; the number must be at least 1")

    def keeps(self, step: int, newer: int) -> bool:
        return step % self.steps == 0


@dataclass(frozen=True, slots=True)
class KeepChosen:
    """Keeps the checkpoints of those steps that `chosen` returns now."""

    chosen: Callable[[], Container[int]]

    def keeps(self, step: int, newer: int) -> bool:
        return step in self.chosen()


def doomed(steps: Sequence[int], policies: Sequence[RetentionPolicy]) -> list[int]:
    """Returns the positions, in the steps of good checkpoints (newest first), that no policy keeps; never the first."""
    return [newer for newer, step in enumerate(steps) if newer and not any(policy.keeps(step, newer) for policy in policies)]


def retire(store: Store, policies: Sequence[RetentionPolicy], *, verify: bool = True) -> list[str]:
    """Removes the checkpoints that no policy keeps, and returns their names. Those that cannot be opened stay.

    With `verify`, every block of the newest is read before anything is removed; if it is damaged, it stays, and the next one counts
    as the newest. Raises CheckpointError if removal fails half-way: the rest is then a temporary directory, for `collect`.
    """
    opened = [entry.source for entry in found(store) if entry.source is not None]
    good = list(opened)
    try:
        chosen = doomed([source.manifest.step for source in good], policies)
        while verify and chosen and not _is_good(good[0]):  # damaged: the next one counts as the newest
            del good[0]
            chosen = doomed([source.manifest.step for source in good], policies)
        removed = [good[position] for position in chosen]
        for source in removed:
            _remove(store, source.name, source.manifest)
        return [source.name for source in removed]
    finally:
        for source in opened:
            source.close()


def _is_good(source: ElasticSource) -> bool:
    problems = list(source.problems())
    for problem in problems:
        _log.warning("a damaged checkpoint is not counted among those to keep: %s", problem)
    return not problems


def _remove(store: Store, name: str, manifest: Manifest) -> None:
    """Ends the checkpoint atomically (by a rename, or by removing its manifest), then removes its files."""
    directory = name
    if store.renames:
        directory = nameless(*manifest.order)
        if not store.rename(name, directory):
            raise CheckpointError(f"{store.where(directory)}: exists already")
        store.sync_directory("")
    else:
        if store.size(f"{directory}/{TOKEN}") is None:
            put_token(store, directory, "retired", list(manifest.files))
        store.remove(f"{directory}/{MANIFEST}")
    remove_all(store, directory, manifest.files)
