"""Tests who may save into a directory: the last job that started there, and no job that was declared dead."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from elastic.agent.save_summary import SaveSummary
from elastic.checkpoint.commit import begin, new_token
from elastic.checkpoint.directory import collect, newest, temporary
from elastic.checkpoint.objects import open_store
from elastic.checkpoint.owner import OWNER, Owner, check_owner, claim, read_owner
from elastic.checkpoint.plan import plan_files
from elastic.checkpoint.store import LocalStore, Store
from elastic.errors import CheckpointError
from elastic.worker.directory_owner import DirectoryOwner
from tests.checkpoint.format_samples import contents_of, values_at

FIRST, SECOND = Owner(job="0123456789abcdef", began_from=None), Owner(job="fedcba9876543210", began_from=(3, 1, 0))


@pytest.fixture(params=["directory", "objects"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return LocalStore(tmp_path) if request.param == "directory" else open_store(f"local://{tmp_path}/run")


def test_the_last_one_that_claimed_it_may_save(store: Store) -> None:
    assert read_owner(store) is None
    check_owner(store, FIRST.job)  # nobody's
    for owner in (FIRST, SECOND):
        claim(store, owner)
        assert read_owner(store) == owner
        check_owner(store, owner.job)
    with pytest.raises(CheckpointError, match=r"another job has started to save here.*directory of its own"):
        check_owner(store, FIRST.job)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"job": 3}', '{"job": "a", "began_from": [1]}', "[" * 5000])
def test_a_file_that_makes_no_sense_claims_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / OWNER).write_text(text)
    assert read_owner(LocalStore(tmp_path)) is None


def test_what_a_job_left_half_saved_is_removed_by_its_successor_at_once(tmp_path: Path) -> None:
    store, plan = LocalStore(tmp_path), plan_files(contents_of(values_at(1, {"a": (3,)})))
    tokens = [new_token(FIRST.tag), new_token(SECOND.tag), new_token()]
    assert [len(token) for token in tokens] == [16, 16, 16]
    directories = [begin(store, plan, step=1, token=token).directory for token in tokens]
    assert sorted(temporary(store)) == sorted(directories)
    assert collect(store, older_than_s=0.0, now=math.inf, tag=FIRST.tag) == directories[:1]
    assert sorted(temporary(store)) == sorted(directories[1:])
    assert newest(store) is None


def test_saves_are_counted() -> None:
    assert SaveSummary().warning is None
    some = SaveSummary().heard(3, None).heard(5, None)
    assert (some.saved, some.newest, some.warning) == (2, 5, None)
    worse = some.heard(7, "disk full").heard(8, "no directory")
    assert worse.warning == (
        "the newest checkpoint is that after 5 steps: 2 saves failed, the last for this reason: after 8 steps: no directory"
    )
    assert SaveSummary().heard(3, "disk full").warning == (
        "no checkpoint was saved: 1 save failed, the last for this reason: after 3 steps: disk full"
    )
    better = worse.heard(9, None)
    assert (better.saved, better.failed, better.newest, better.warning) == (3, 2, 9, None)
    assert SaveSummary(**better.to_json()) == better == replace(better)


def joiner(store: Store, job: str) -> DirectoryOwner:
    """Of a worker that joins this job now."""
    found = DirectoryOwner(store, b"")
    found.own = Owner(job=job, began_from=None)
    found.join()
    return found


def test_a_joiner_takes_no_directory_back_from_a_later_job(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    claim(store, SECOND)
    with pytest.raises(CheckpointError, match="another job has started to save here"):
        joiner(store, FIRST.job).may_save(store)
    joiner(store, SECOND.job).may_save(store)
    assert read_owner(store) == SECOND, "what the job began from is not forgotten"
