"""Commits a save atomically: all of it becomes a checkpoint, or nothing.

    coordinator   begin    makes a directory for this try alone, named by step, epoch, attempt and a random token; in it, a token file that
                           lists the files; every file at its full size (this finds a full disk); headers and index
    every worker  write_runs   checks the token (no token: this host does not see that directory), writes its runs, syncs, returns
                           a receipt: byte ranges and sums
    coordinator   commit   checks that every byte of every file is in exactly one receipt, and sizes; writes and syncs the manifest; syncs
                           the directory; removes the token; syncs the directory; renames it; syncs the parent; updates the hint `latest`

A crash before the rename leaves a directory that no reader looks at. The rename is atomic, and everything is on disk before it. A store
without rename (objects) uses the final name from the start; there the manifest, written last, is the commit. Where workers cannot write
into one file, `join` makes the files from the parts that they wrote, before the receipts are sent.

An evicted writer that wakes up does no harm. It writes to its own directory only. If that was committed, its receipt had been sent, so it
had written everything and writes no more; else it will never be committed. A final name is never taken twice; `latest` never moves back.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from elastic.checkpoint.blocks import block_count, block_digests, combined, contributions
from elastic.checkpoint.manifest import MANIFEST, MAX_MANIFEST_BYTES, StoredFile, decode, encode, manifest_of
from elastic.checkpoint.plan import DEFAULT_FILE_BYTES, FilePlan, PlannedFile, TensorKey, plan_files
from elastic.checkpoint.slices import Slicing
from elastic.checkpoint.state import Contents
from elastic.checkpoint.store import PART, Store, read_all
from elastic.checkpoint.writer import PartReceipt, PartSums, TensorRun, joined, write_part
from elastic.errors import CheckpointError
from elastic.memory import raw

_log = logging.getLogger(__name__)
TEMPORARY = ".tmp-"
TOKEN = ".token"
LATEST = "latest"
_MAX_SMALL_BYTES = 4096
_ZEROS = raw.zeros(1 << 20)
_MAX_TOKEN_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """One try at one save; every worker that writes gets it. `fingerprint` is that of the plan."""

    step: int
    epoch: int
    attempt: int
    token: str
    directory: str
    fingerprint: str

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON that is sent to the workers; `Ticket(**data)` is the inverse."""
        return asdict(self)


def final_name(step: int) -> str:
    """Returns the usual name of a step's checkpoint."""
    return f"step-{step:08d}"


def retry_name(step: int, epoch: int, attempt: int) -> str:
    """Returns the name for when the usual one is taken by a directory that is not a checkpoint, or by one of an older epoch."""
    return f"{final_name(step)}-e{epoch}-a{attempt}"


def nameless(step: int, epoch: int, attempt: int) -> str:
    """Returns a new name for a directory before its removal: no reader opens it, and `collect` removes what is left of it."""
    return f"{TEMPORARY}{retry_name(step, epoch, attempt)}-{new_token()}"


def new_token(tag: str = "") -> str:
    """Returns a unique token for one try at one save: 16 hex digits, beginning with `tag`."""
    return tag + os.urandom(8).hex()[len(tag) :]


def ticket_of(store: Store, plan: FilePlan, *, step: int, epoch: int = 0, attempt: int = 0, token: str) -> Ticket:
    """Returns the ticket that the coordinator makes with this token. Raises CheckpointError if a number is negative."""
    if min(step, epoch, attempt) < 0:
        raise CheckpointError(f"step {step}, epoch {epoch} and attempt {attempt} must not be negative")
    name = f"{retry_name(step, epoch, attempt)}-{token}"
    directory = TEMPORARY + name if store.renames else name
    return Ticket(step=step, epoch=epoch, attempt=attempt, token=token, directory=directory, fingerprint=plan.fingerprint)


def begin(store: Store, plan: FilePlan, *, step: int, epoch: int = 0, attempt: int = 0, token: str | None = None) -> Ticket:
    """Makes the directory and all files in it. Raises CheckpointError if that fails, and leaves nothing."""
    ticket = ticket_of(store, plan, step=step, epoch=epoch, attempt=attempt, token=token or new_token())
    directory = ticket.directory
    store.make_directory(directory)
    try:
        put_token(store, directory, ticket.token, [file.name for file in plan.files])
        store.sync_directory(directory)  # no file exists before the list that names it
        for file in plan.files:
            store.create(f"{directory}/{file.name}", file.size)
            _write_own(store, directory, file)
    except CheckpointError:
        abandon(store, plan, ticket)
        raise
    return ticket


def put_token(store: Store, directory: str, token: str, files: Sequence[str]) -> None:
    """Writes the directory's token and the list of its files, which a later clean-up reads."""
    store.put(f"{directory}/{TOKEN}", token_bytes(token, files))


def token_bytes(token: str, files: Iterable[str]) -> bytes:
    """Returns the bytes that `put_token` writes."""
    return "\n".join([token, *files]).encode()


def listed(store: Store, directory: str) -> list[str]:
    """Returns the files that the directory's token lists or, without a token, its manifest; nothing if neither can be read."""
    for name, limit in ((TOKEN, _MAX_TOKEN_BYTES), (MANIFEST, MAX_MANIFEST_BYTES)):
        path = f"{directory}/{name}"
        if store.size(path) is not None:
            with suppress(CheckpointError, UnicodeDecodeError):
                data = read_all(store, path, limit)
                return data.decode().split("\n")[1:] if name == TOKEN else list(decode(data, store.where(path)).files)
    return []


def _write_own(store: Store, directory: str, file: PlannedFile) -> None:
    opened = store.open_write(f"{directory}/{file.name}")
    try:
        opened.write(raw.as_bytes(file.head), 0)
        for start, stop in file.zeros:
            for place in range(start, stop, _ZEROS.size):
                opened.write(_ZEROS[: stop - place], place)
        opened.sync()
    finally:
        opened.close()


def write_runs(plan: FilePlan, store: Store, ticket: Ticket, runs: Iterable[TensorRun], *, threads: int = 2) -> PartReceipt:
    """Writes this worker's runs, and returns the receipt.

    Raises CheckpointError if its plan differs, if it does not see the coordinator's directory, or if writing fails.
    """
    if plan.fingerprint != ticket.fingerprint:
        raise CheckpointError(
            f"{store.where(ticket.directory)}: this worker plans other files than the coordinator: shapes or names of tensors differ"
        )
    path = f"{ticket.directory}/{TOKEN}"
    try:
        found = read_all(store, path, _MAX_TOKEN_BYTES).partition(b"\n")[0]
    except CheckpointError as error:
        raise CheckpointError(
            f"{store.where(ticket.directory)}: this host does not see the coordinator's directory ({error}): "
            "checkpoints need a directory that all hosts share"
        ) from error
    if found != ticket.token.encode():
        raise CheckpointError(f"{store.where(path)}: holds {found[:40]!r}, which is another save's token")
    return write_part(plan, store, ticket.directory, ticket.token, runs, threads)


def join(plan: FilePlan, store: Store, ticket: Ticket, place: int = 0, workers: int = 1) -> bool:
    """Joins the parts of the files of the worker at `place`, in a store that has parts. Returns False while parts are missing."""
    return all(store.join(f"{ticket.directory}/{file.name}", file.size) for file in plan.files[place::workers])


def commit(store: Store, plan: FilePlan, ticket: Ticket, receipts: Sequence[PartReceipt], *, layout: Any = None) -> str:
    """Makes the save a checkpoint, and returns its name. `layout` is any JSON.

    Raises CheckpointError unless every byte was written once; if the step was saved before by this or a later epoch; if writing fails.
    After an error, call `abandon`. After an error of the last sync or of `latest`, the checkpoint is complete.
    """
    _check_epoch(store, ticket)
    files = {file.name: _stored(store, ticket, file, receipts) for file in plan.files}
    reported = {name: values for part in [plan.contents, *receipts] for name, values in part.scalars.items()}
    scalars = {name: reported[name] for name in [*plan.contents.tensors, *reported] if name in reported}
    saved = replace(plan, contents=replace(plan.contents, step=ticket.step, scalars=scalars))
    manifest = manifest_of(saved, files, step=ticket.step, epoch=ticket.epoch, attempt=ticket.attempt, layout=layout)
    data = encode(manifest, store.where(f"{ticket.directory}/{MANIFEST}"))
    if len(data) > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{store.where(ticket.directory)}: its manifest would have {len(data)} bytes, above {MAX_MANIFEST_BYTES}")
    store.put(f"{ticket.directory}/{MANIFEST}", data)
    store.sync_directory(ticket.directory)
    with nullcontext() if store.renames else suppress(CheckpointError):  # without renames it is a checkpoint already
        store.remove(f"{ticket.directory}/{TOKEN}")
    store.sync_directory(ticket.directory)
    name = _rename(store, ticket) if store.renames else ticket.directory
    store.sync_directory("")
    advance_latest(store, name, (ticket.step, ticket.epoch, ticket.attempt))
    return name


def _stored(store: Store, ticket: Ticket, file: PlannedFile, receipts: Sequence[PartReceipt]) -> StoredFile:
    """Returns the digests of a file from the receipts of all its writers."""
    where = store.where(f"{ticket.directory}/{file.name}")
    parts = [receipt.files[file.name] for receipt in [_own_receipt(ticket, file), *receipts] if file.name in receipt.files]
    if any(receipt.token != ticket.token for receipt in receipts):
        raise CheckpointError(f"{where}: a receipt is of another save")
    written = joined([run for part in parts for run in part.ranges], where)
    if written != (((0, file.size),) if file.size else ()):
        gap = written[0][1] if written and not written[0][0] else 0
        raise CheckpointError(f"{where}: {sum(b - a for a, b in written)} of its {file.size} bytes were written; byte {gap} was not")
    size = store.size(f"{ticket.directory}/{file.name}")
    if size != file.size:
        raise CheckpointError(f"{where}: it should have {file.size} bytes and has {size}")
    sums = raw.typed(raw.zeros(4 * block_count(file.size)), np.uint32)
    for part in parts:
        sums[list(part.blocks)] ^= raw.typed(part.sums, "<u4")
    return StoredFile(size=file.size, blocks=block_digests(combined(sums, file.size)))


def _own_receipt(ticket: Ticket, file: PlannedFile) -> PartReceipt:
    """Returns the receipt of the coordinator's part: the head, and padding, whose zeros add nothing to the sums."""
    sums = PartSums()
    for start, stop in file.zeros:
        sums.add(file.name, start, stop - start, 0, np.array([], dtype=np.uint32))
    if file.head:
        sums.add(file.name, 0, len(file.head), *contributions(raw.as_bytes(file.head), 0, file.size))
    return sums.receipt(ticket.token)


def _rename(store: Store, ticket: Ticket) -> str:
    name = final_name(ticket.step)
    if store.rename(ticket.directory, name):
        return name
    order = _order_of(store, name)
    if order is None or order < (ticket.step, ticket.epoch, ticket.attempt):
        retry = retry_name(ticket.step, ticket.epoch, ticket.attempt)
        if store.rename(ticket.directory, retry):
            _log.warning("%s exists and is not this checkpoint; this one is named %s", store.where(name), retry)
            return retry
    raise CheckpointError(f"{store.where(name)}: exists already; it is not overwritten")


def _order_of(store: Store, name: str) -> tuple[int, int, int] | None:
    path = f"{name}/{MANIFEST}"
    try:
        return decode(read_all(store, path, MAX_MANIFEST_BYTES), store.where(path)).order
    except CheckpointError:
        return None


def abandon(store: Store, plan: FilePlan, ticket: Ticket) -> None:
    """Removes the ticket's directory as far as the store permits; a committed checkpoint stays."""
    if not store.renames and store.size(f"{ticket.directory}/{MANIFEST}") is not None:
        return
    names = [file.name for file in plan.files]
    if not store.shared_writes:
        path = f"{ticket.directory}/{TOKEN}"
        with suppress(CheckpointError):  # an empty token stops others' waits for parts; its list stays until the files are gone
            if store.size(path) is not None:
                store.replace(path, token_bytes("", names))
        with suppress(CheckpointError):
            names += [name for name in store.names(ticket.directory) if name.startswith(PART)]
    remove_all(store, ticket.directory, names, tolerant=True)


def take_over(store: Store, plan: FilePlan, ticket: Ticket) -> None:
    """Removes the directory of a coordinator that is gone, as far as the store permits; a committed checkpoint stays.

    The directory is renamed first, so that a coordinator that still runs cannot commit it with files missing. A store without renames
    leaves it to `collect`.
    """
    if store.renames:
        directory = nameless(ticket.step, ticket.epoch, ticket.attempt)
        with suppress(CheckpointError):  # it was committed or removed already
            store.rename(ticket.directory, directory)
            remove_all(store, directory, [file.name for file in plan.files], tolerant=True)


def remove_all(store: Store, directory: str, names: Iterable[str], *, tolerant: bool = False) -> None:
    """Removes files, then the lists of them, then the directory, in an order that survives power loss. With other files in it, it stays.

    Raises CheckpointError unless `tolerant`: then it ignores errors.
    """
    ignored = suppress(CheckpointError) if tolerant else nullcontext()
    for name in names:
        with ignored:
            store.remove(f"{directory}/{name}")
    with ignored:
        if store.names(directory):  # no other process has removed it
            store.sync_directory(directory)
    for name in (MANIFEST, TOKEN):
        with ignored:
            store.remove(f"{directory}/{name}")
    with ignored:
        store.remove_directory(directory)


def read_latest(store: Store) -> tuple[str, tuple[int, int, int]] | None:
    """Reads the hint `latest`: a name and its (step, epoch, attempt). Returns None if it is missing or malformed."""
    try:
        data = json.loads(read_all(store, LATEST, _MAX_SMALL_BYTES))
        return str(data["name"]), (int(data["step"]), int(data["epoch"]), int(data["attempt"]))
    except (CheckpointError, ValueError, KeyError, TypeError, RecursionError):
        return None


def advance_latest(store: Store, name: str, order: tuple[int, int, int]) -> None:
    """Sets the hint `latest` to this checkpoint, unless it names this one or a newer one."""
    hint = read_latest(store)
    if hint is not None and hint[1] >= order:
        return
    step, epoch, attempt = order
    text = json.dumps({"name": name, "step": step, "epoch": epoch, "attempt": attempt})
    store.replace(LATEST, text.encode() + b"\n")


def _check_epoch(store: Store, ticket: Ticket) -> None:
    hint = read_latest(store)
    if hint is not None and hint[1][1] > ticket.epoch:
        raise CheckpointError(
            f"{store.where(ticket.directory)}: this save is of epoch {ticket.epoch}, and {hint[0]} was saved in epoch {hint[1][1]}: "
            "this writer was evicted from the job, so its save is not committed"
        )


def save(
    store: Store,
    contents: Contents,
    runs: Iterable[TensorRun],
    *,
    step: int,
    epoch: int = 0,
    attempt: int = 0,
    layout: Any = None,
    max_file_bytes: int = DEFAULT_FILE_BYTES,
    threads: int = 2,
    slicings: Mapping[TensorKey, Slicing] = MappingProxyType({}),
) -> str:
    """Writes a checkpoint from one process, and returns its name. Raises CheckpointError, with nothing left behind."""
    plan = plan_files(contents, max_file_bytes, slicings)
    ticket = begin(store, plan, step=step, epoch=epoch, attempt=attempt)
    try:
        receipt = write_runs(plan, store, ticket, runs, threads=threads)
        join(plan, store, ticket)
        return commit(store, plan, ticket, [receipt], layout=layout)
    except CheckpointError:
        abandon(store, plan, ticket)
        raise
