"""Tests that clean-up removes what no policy keeps, but never the last good checkpoint or files that no save wrote."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.checkpoint.commit import begin, save
from elastic.checkpoint.directory import collect, found, named_step, newest
from elastic.checkpoint.plan import plan_files
from elastic.checkpoint.retention import KeepChosen, KeepEvery, KeepLast, RetentionPolicy, doomed, retire
from elastic.checkpoint.store import LocalStore
from elastic.errors import CheckpointError
from tests.checkpoint.format_samples import contents_of, values_at, whole_runs

SHAPES = {"a": (9, 9)}


def store_with(root: Path, *steps: int) -> LocalStore:
    store = LocalStore(root)
    for step in steps:
        values = values_at(step, SHAPES)
        save(store, contents_of(values), whole_runs(values), step=step, threads=1)
    return store


def steps_in(root: Path) -> list[int]:
    return [step for step in map(named_step, sorted(os.listdir(root))) if step is not None]


@pytest.mark.parametrize(
    ("policies", "kept"),
    [
        ([KeepLast(1)], [6]),
        ([KeepLast(2)], [5, 6]),
        ([KeepEvery(3)], [3, 6]),
        ([KeepLast(2), KeepEvery(2)], [2, 4, 5, 6]),
        ([KeepLast(1), KeepChosen(lambda: [2, 9])], [2, 6]),
        ([KeepEvery(100)], [6]),
        ([], [6]),
    ],
)
def test_policies(tmp_path: Path, policies: list[RetentionPolicy], kept: list[int]) -> None:
    store = store_with(tmp_path, 1, 2, 3, 4, 5, 6)
    removed = retire(store, policies)
    assert steps_in(tmp_path) == kept
    assert len(removed) == 6 - len(kept)
    assert [entry.step for entry in found(store) if entry.source] == kept[::-1]


@given(st.lists(st.integers(0, 50), unique=True), st.integers(1, 5), st.integers(1, 9))
def test_the_newest_is_never_doomed(steps: list[int], last: int, every: int) -> None:
    steps.sort(reverse=True)
    chosen = doomed(steps, [KeepLast(last), KeepEvery(every)])
    kept = [step for position, step in enumerate(steps) if position not in chosen]
    assert kept[:last] == steps[:last]
    assert set(steps) - set(kept) == {step for step in steps[last:] if step % every}


def test_a_damaged_newest_one_does_not_cost_the_last_good_one(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1, 2)
    path = next((tmp_path / "step-00000002").glob("model-0*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert retire(store, [KeepLast(1)]) == []
    source = newest(store, verify=True)
    assert source is not None
    assert source.manifest.step == 1


def test_the_newest_good_one_stays_behind_a_damaged_one_although_an_older_is_kept(tmp_path: Path) -> None:
    store = store_with(tmp_path, 10, 14, 15, 20)
    path = next((tmp_path / "step-00000020").glob("optimizer-*"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert retire(store, [KeepLast(1), KeepEvery(10)]) == ["step-00000014"]
    assert steps_in(tmp_path) == [10, 15, 20]


def test_what_cannot_be_opened_is_left_and_does_not_count(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1, 2, 3)
    (tmp_path / "step-00000003" / "manifest.json").write_bytes(b"?")
    assert retire(store, [KeepLast(1)]) == ["step-00000001"]
    assert steps_in(tmp_path) == [2, 3]


def test_a_persons_own_files_stay(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1, 2)
    (tmp_path / "step-00000001" / "notes.txt").write_text("precious")
    (tmp_path / "notes.txt").write_text("precious")
    retire(store, [KeepLast(1)])
    collect(store, older_than_s=0, now=os.stat(tmp_path).st_mtime + 60)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"precious"] == ["notes.txt"] * 2
    assert steps_in(tmp_path) == [2]


def test_only_old_temporary_directories_are_collected(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1)
    begin(store, plan_files(contents_of(values_at(2, SHAPES))), step=2)
    (tmp_path / ".tmp-mine").mkdir()
    now = os.stat(tmp_path).st_mtime
    assert collect(store, older_than_s=3600, now=now + 60) == []
    assert len(collect(store, older_than_s=3600, now=now + 3700)) == 1
    assert sorted(os.listdir(tmp_path)) == [".tmp-mine", "latest", "step-00000001"]


@pytest.mark.parametrize("policy", [lambda: KeepLast(0), lambda: KeepEvery(0)])
def test_policies_that_keep_nothing_are_refused(policy) -> None:
    with pytest.raises(CheckpointError):
        policy()
