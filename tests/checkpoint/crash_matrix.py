"""Breaks a save at each of its file-system calls, in every way, and checks what can be loaded afterwards.

    python -m tests.checkpoint.crash_matrix

Two workers, whose runs meet inside blocks, save step 12 into a directory that holds steps 10 and 11. Then the policy "last two" removes
step 10. After each fault the newest checkpoint must be 11 or 12, bit for bit (12 if the save had returned). A save of step 13 and a
clean-up in the same directory must then work. The matrix runs for whole tensors, for tensors stored as padded slices, and for an object
store at every call of fsspec. Exits with 0 only if every cell passes.
"""

from __future__ import annotations

import errno
import logging
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from elastic.checkpoint.commit import abandon, begin, commit, join, save, write_runs
from elastic.checkpoint.directory import collect, newest, temporary
from elastic.checkpoint.plan import TensorKey, plan_files
from elastic.checkpoint.retention import KeepLast, retire
from elastic.checkpoint.slices import Slicing
from elastic.checkpoint.store import LocalStore, Store
from elastic.errors import CheckpointError
from tests.checkpoint.format_samples import contents_of, equals, values_at, whole_runs
from tests.checkpoint.power_loss import Disk, Variant, successful
from tests.checkpoint.recorded_calls import Call, Recorder, failing, in_child, kill, kill_torn

OLD, NEW = 11, 12
_SHAPES = {"embed.weight": (70, 1000), "norm": (129,)}
_VALUES = {step: values_at(step, _SHAPES) for step in (10, OLD, NEW, 13)}
_CUT = 33_000
Slicings = Mapping[TensorKey, Slicing]
WHOLE: Slicings = {}
SLICED: Slicings = {("embed.weight", state): Slicing(dim=0, widths=((40, 30),), padded=(40, 40)) for state in ("param", "exp_avg")}
_VARIANTS: tuple[Variant, ...] = ("least", "entries", "data", "some")
Table = dict[tuple[str, str], Counter[str]]


def the_save(store: Store, slicings: Slicings) -> None:
    """Runs the save that the matrix breaks. Raises CheckpointError."""
    values = _VALUES[NEW]
    plan = plan_files(contents_of(values), 200_000, slicings)
    ticket = begin(store, plan, step=NEW)
    parts = ([], [])
    for name, state, _, tensor in whole_runs(values):
        flat = tensor.reshape(-1)
        cut = min(_CUT, flat.numel())
        parts[0].append((name, state, 0, flat[:cut]))
        parts[1].append((name, state, cut, flat[cut:]))
    try:
        receipts = [write_runs(plan, store, ticket, part, threads=1) for part in parts]
        for place in range(len(parts)):
            join(plan, store, ticket, place, len(parts))
        commit(store, plan, ticket, receipts)
    except CheckpointError:
        abandon(store, plan, ticket)
        raise
    retire(store, [KeepLast(2)])


def prepared(store: Store) -> None:
    """Steps 10 and 11."""
    for step in (10, OLD):
        save(store, contents_of(_VALUES[step]), whole_runs(_VALUES[step]), step=step, threads=1)


def outcome(store: Store, remove: Callable[[str], object], *, must_be_new: bool = False) -> str:
    """`old` or `new`, if all is well; what is wrong otherwise. `remove` takes a checkpoint away by its name."""
    try:
        first = _loaded(store)
        if first not in (OLD, NEW) or (must_be_new and first != NEW):
            return f"BAD: loads {first}"
        name = save(store, contents_of(_VALUES[13]), whole_runs(_VALUES[13]), step=13, threads=1)
        collect(store, older_than_s=0, now=time.time() + 60)
        if _loaded(store) != 13 or temporary(store):
            return "BAD: not usable afterwards"
        remove(name)
        if _loaded(store) != first:
            return "BAD: the clean-up lost it"
    except CheckpointError as error:
        return f"BAD: refused: {error}"
    return "old" if first == OLD else "new"


def outcome_in(root: Path, *, must_be_new: bool = False) -> str:
    """Returns the outcome in a directory."""
    return outcome(LocalStore(root), lambda name: shutil.rmtree(root / name), must_be_new=must_be_new)


def _loaded(store: Store) -> int | None:
    source = newest(store, verify=True)
    if source is None:
        return None
    step = source.manifest.step
    same = equals(source, _VALUES[step])
    source.close()
    return step if same else -step


def calls_of_a_save(start: Path, scratch: Path, slicings: Slicings) -> list[Call]:
    """Returns the calls of an unbroken save."""
    root = _copy(start, scratch)
    recorder = Recorder()
    the_save(LocalStore(root, calls=recorder), slicings)
    return recorder.calls


def _copy(start: Path, scratch: Path) -> Path:
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(start, scratch)
    return scratch


def killed(start: Path, scratch: Path, slicings: Slicings, number: int, fault: Callable[[Call], None]) -> str:
    """SIGKILL at that call, in a process of its own."""
    root = _copy(start, scratch)
    ended = in_child(lambda: the_save(LocalStore(root, calls=Recorder(at=number, fault=fault)), slicings))
    return outcome_in(root) if ended == -signal.SIGKILL else f"BAD: the fault did not happen ({ended})"


def failed(start: Path, scratch: Path, slicings: Slicings, number: int, code: int) -> str:
    """That call fails; the saver must say so, or go on unharmed."""
    root = _copy(start, scratch)
    recorder = Recorder(at=number, fault=failing(code))
    try:
        the_save(LocalStore(root, calls=recorder), slicings)
        said = False
    except CheckpointError:
        said = True
    if not recorder.fired:
        return "BAD: the fault did not happen"
    return outcome_in(root, must_be_new=not said)


def power_lost(start: Path, scratch: Path, calls: list[Call], number: int, variant: Variant) -> str:
    """The machine goes down before that call."""
    root = scratch.parent / "recorded"  # the directory of the recorded calls
    disk = Disk(_copy(start, root))
    for call in successful(calls[:number]):
        disk.follow(call)
    shutil.rmtree(scratch, ignore_errors=True)
    disk.crash(scratch, variant, seed=number)
    return outcome_in(scratch, must_be_new=number == len(calls))


def cells(work: Path, slicings: Slicings) -> Iterator[tuple[str, str, str]]:
    """`(kind of call, fault, outcome)` of every cell."""
    start, scratch = work / "start", work / "scratch"
    prepared(LocalStore(start))
    calls = calls_of_a_save(start, work / "recorded", slicings)
    for number, call in enumerate(calls):
        yield call.kind, "SIGKILL", killed(start, scratch, slicings, number, kill)
        if call.kind == "pwrite":
            yield call.kind, "SIGKILL, torn", killed(start, scratch, slicings, number, kill_torn)
        for code in (errno.ENOSPC, errno.EIO, errno.EROFS):
            yield call.kind, errno.errorcode[code], failed(start, scratch, slicings, number, code)
        for variant in _VARIANTS:
            yield call.kind, f"power: {variant}", power_lost(start, scratch, calls, number, variant)
    for variant in _VARIANTS:
        yield "(returned)", f"power: {variant}", power_lost(start, scratch, calls, len(calls), variant)


def show(table: Table) -> None:
    """Rows are calls, columns faults; a cell says how often the old and the new checkpoint were loaded."""
    kinds = list(dict.fromkeys(kind for kind, _ in table))
    faults = list(dict.fromkeys(fault for _, fault in table))
    print(f"{'call':<20}" + "".join(f"{fault:>16}" for fault in faults))
    for kind in kinds:
        row = [table.get((kind, fault), Counter()) for fault in faults]
        print(f"{kind:<20}" + "".join(f"{_cell(counts):>16}" for counts in row))
    total = sum(sum(counts.values()) for counts in table.values())
    print(f"{total} faults; a cell: loads of the old checkpoint / of the new one")


def _cell(counts: Counter[str]) -> str:
    bad = sum(count for result, count in counts.items() if result.startswith("BAD"))
    return f"BAD {bad}" if bad else f"{counts['old']} / {counts['new']}" if counts else ""


def main() -> int:
    logging.disable(logging.WARNING)
    from tests.checkpoint import broken_objects  # it imports this module

    bad: list[str] = []
    with tempfile.TemporaryDirectory(prefix="crash-matrix-") as directory:
        whole, sliced = (cells(Path(directory, f"{len(slicings)} sliced"), slicings) for slicings in (WHOLE, SLICED))
        for title, found in (("whole tensors", whole), ("slices", sliced), ("objects", broken_objects.cells())):
            table: Table = {}
            for kind, fault, result in found:
                table.setdefault((kind, fault), Counter())[result] += 1
            print(title)
            show(table)
            bad += [
                f"{title}: {kind}, {fault}: {each}" for (kind, fault), counts in table.items() for each in counts if each.startswith("BAD")
            ]
    print("\n".join(bad[:40]) or "every cell holds")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
