"""Tests of temporary run directories."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from elastic.host.rundir import RunDirectory
from elastic.host.temporary import temporary


def test_what_killed_jobs_have_left_is_removed_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, running, young, others = (temporary() for _ in range(4))
    named = RunDirectory(tmp_path / "elastic-mine")  # given as directory=
    for directory in (left, running, others, named):
        with directory.prepared():
            (directory.path / "etcd" / "data").mkdir(parents=True)
    for directory in (left, running, others):
        os.utime(directory.path / "temporary", (1, 1))
    link = tmp_path / "elastic-link"
    link.symlink_to(left.path)
    with running.prepared(), monkeypatch.context() as other_user:
        uid = os.geteuid()
        other_user.setattr(os, "geteuid", lambda: uid + 1)
        temporary()
        assert all(directory.path.exists() for directory in (left, running, young, others, named))
    with running.prepared():
        os.utime(others.path / "temporary")
        temporary()
    assert [directory.path.exists() for directory in (left, running, young, others, named)] == [False, True, True, True, True]
    assert link.is_symlink()
