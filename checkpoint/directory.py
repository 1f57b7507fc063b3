"""Lists the checkpoints in a directory, finds the newest good one, and removes what dead savers left."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from elastic.checkpoint.commit import TEMPORARY, listed, remove_all
from elastic.checkpoint.manifest import MANIFEST, OtherVersion
from elastic.checkpoint.plan import INDEX
from elastic.checkpoint.reader import ElasticSource
from elastic.checkpoint.store import PART, Store
from elastic.errors import CheckpointError

_log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8,18})(?:-e(\d+)-a(\d+)(?:-[0-9a-f]{16})?)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundCheckpoint:
    """A directory with the name of a checkpoint: opened, or the error that opening it raised."""

    name: str
    step: int
    source: ElasticSource | None = None
    error: CheckpointError | None = None


def named_step(name: str) -> int | None:
    """Returns the step in the name of a checkpoint; None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def found(store: Store) -> Iterator[FoundCheckpoint]:
    """Yields the store's checkpoints, newest first, opened one step at a time.

    In a store without renames the manifest is the commit, so a directory without one is skipped.
    """
    steps: dict[int, list[str]] = {}
    for name in store.names(""):
        step = named_step(name)
        if step is not None:
            steps.setdefault(step, []).append(name)
    for step in sorted(steps, reverse=True):
        opened = [_open(store, name, step) for name in steps[step] if store.renames or _has_manifest(store, name)]
        yield from sorted(opened, key=_age, reverse=True)


def _age(entry: FoundCheckpoint) -> tuple[int, int, int]:
    """Returns the order in time; what cannot be opened counts as newest, because it may be."""
    return entry.source.manifest.order if entry.source else (1 << 63, 0, 0)


def _has_manifest(store: Store, name: str) -> bool:
    return store.size(f"{name}/{MANIFEST}") is not None


def _open(store: Store, name: str, step: int) -> FoundCheckpoint:
    try:
        source = ElasticSource(store, name)
        if source.manifest.step != step:
            raise CheckpointError(f"{store.where(name)}: its manifest is of step {source.manifest.step}, its name of step {step}")
    except CheckpointError as error:
        return FoundCheckpoint(name=name, step=step, error=error)
    return FoundCheckpoint(name=name, step=step, source=source)


def newest(store: Store, *, verify: bool = False, only: Callable[[ElasticSource], bool] = lambda source: True) -> ElasticSource | None:
    """Returns the newest good checkpoint for which `only` is true; None if none has a checkpoint's name, or `only` refuses all good ones.

    Good means: the manifest's digest is right and files have their sizes; with `verify`, every block is read and checked. Later reads are
    checked in any case. Damaged checkpoints are logged with the reason.

    Raises:
        OtherVersion: the newest has another version of the format; skipping it would silently lose steps.
        CheckpointError: there are damaged ones, and no good one for which `only` is true.
    """
    reasons: list[str] = []
    for entry in found(store):
        try:
            if isinstance(entry.error, OtherVersion):
                raise entry.error
            if entry.source is not None:
                if not only(entry.source):
                    entry.source.close()
                    continue
                if verify:
                    entry.source.verify()
                return entry.source
            reasons.append(str(entry.error))
        except OtherVersion:
            raise
        except CheckpointError as error:
            reasons.append(str(error))
            if entry.source is not None:
                entry.source.close()
        _log.warning("checkpoint %s is skipped: %s", entry.name, reasons[-1])
    if reasons:
        raise CheckpointError(f"{store.where('')}: no good checkpoint among {len(reasons)}: " + "; ".join(reasons))
    return None


def temporary(store: Store) -> list[str]:
    """Returns the directories of saves that are not (yet) committed."""
    if store.renames:
        return [name for name in store.names("") if name.startswith(TEMPORARY) and named_step(name[len(TEMPORARY) :]) is not None]
    return [name for name in store.names("") if named_step(name) is not None and not _has_manifest(store, name)]


def collect(store: Store, *, older_than_s: float, now: float, tag: str = "") -> list[str]:
    """Removes temporary directories in which nothing changed since `now - older_than_s` (seconds since 1970), and returns their names.

    Their savers count as dead. `tag` selects the saves whose token begins with it. Only files that a save makes are removed; a directory
    that holds anything else stays.
    """
    removed: list[str] = []
    for name in temporary(store):
        if not name.rpartition("-")[2].startswith(tag):
            continue
        files = store.names(name)
        touched = [store.changed(f"{name}/{file}") for file in files] + ([store.changed(name)] if store.renames else [])
        if max(touched, default=0.0) > now - older_than_s:
            continue
        named = {INDEX, *listed(store, name)}
        ours = [file for file in files if file in named or file.endswith(".safetensors") or file.startswith(PART)]
        remove_all(store, name, ours)
        removed.append(name)
    return removed
