"""Ownership of a directory of checkpoints: only the last job that began there may save into it.

`owner.json` holds a random id of that job. A job claims the directory when it begins, and checks it before each save: if another job has
claimed it since, the save is refused. So a job that was thought dead never mixes its steps with its successor's. This is not a lock: if
two jobs claim at the same moment, one of them learns only at its next save that it is not the owner.
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
    """The owner: `job` is 16 hex digits; `began_from` is the order (step, epoch, attempt) of the checkpoint it resumed from, or None."""

    job: str
    began_from: tuple[int, int, int] | None

    @property
    def tag(self) -> str:
        """The first digits of the tokens of the job's saves; a save's temporary directory has a name that ends in its token."""
        return self.job[:TAG_DIGITS]


def read_owner(store: Store) -> Owner | None:
    """Returns the owner; None if no job has claimed the directory, or the file is malformed."""
    try:
        data = json.loads(read_all(store, OWNER, _MAX_BYTES))
        if data["began_from"] is None:
            return Owner(job=str(data["job"]), began_from=None)
        step, epoch, attempt = map(int, data["began_from"])
        return Owner(job=str(data["job"]), began_from=(step, epoch, attempt))
    except (CheckpointError, ValueError, KeyError, TypeError, RecursionError):
        return None


def claim(store: Store, owner: Owner) -> None:
    """Writes the owner. Raises CheckpointError if that fails."""
    with suppress(CheckpointError):
        store.make_directory("")  # it may exist already
    text = json.dumps({"job": owner.job, "began_from": owner.began_from})
    store.replace(OWNER, text.encode() + b"\n")


def check_owner(store: Store, job: str) -> None:
    """Raises CheckpointError if another job has claimed the directory."""
    owner = read_owner(store)
    if owner is not None and owner.job != job:
        raise CheckpointError(
            f"{store.where('')}: another job has started to save here, so this job no longer saves. To run both, "
            "give each a directory of its own"
        )
