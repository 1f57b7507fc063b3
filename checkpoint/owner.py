"""Which job may save into a directory of checkpoints: the last one that began there.

`owner.json` holds a random id of that job. A job claims the directory when it begins, and looks before each save: if another job has
claimed it meanwhile, this one's saves are refused. So a job that was thought dead never mixes its steps with its successor's. Nothing here
is a lock: two jobs that claim at the same moment both believe, until the next save, that the directory is theirs.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass

from elastic.checkpoint.store import Store, read_all
from elastic.errors import CheckpointError

OWNER = "owner.json"
_MAX_BYTES = 4096
TAG_DIGITS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """`job` is 16 hex digits; `began_from` is the order (step, epoch, attempt) of the checkpoint that the job went on from, if it did."""

    job: str
    began_from: tuple[int, int, int] | None

    @property
    def tag(self) -> str:
        """The first digits of the token of each of the job's saves, with which the names of their temporary directories end."""
        return self.job[:TAG_DIGITS]


def read_owner(store: Store) -> Owner | None:
    """Whose directory it is; None if nobody has claimed it, or the file makes no sense."""
    try:
        data = json.loads(read_all(store, OWNER, _MAX_BYTES))
        if data["began_from"] is None:
            return Owner(job=str(data["job"]), began_from=None)
        step, epoch, attempt = map(int, data["began_from"])
        return Owner(job=str(data["job"]), began_from=(step, epoch, attempt))
    except (CheckpointError, ValueError, KeyError, TypeError, RecursionError):
        return None


def claim(store: Store, owner: Owner) -> None:
    """Makes it the owner. Raises CheckpointError if that cannot be written."""
    with suppress(CheckpointError):
        store.make_directory("")  # else it exists already
    text = json.dumps({"job": owner.job, "began_from": owner.began_from})
    store.replace(OWNER, text.encode() + b"\n")


def check_owner(store: Store, job: str) -> None:
    """Raises CheckpointError if another job has claimed the directory."""
    owner = read_owner(store)
    if owner is not None and owner.job != job:
        raise CheckpointError(
            f"{store.where('')}: another job has begun to save here, so this one no longer does. If both shall run, "
            "give each a directory of its own"
        )
