"""Tests that limits too small for a job are reported at once, and that a job at exactly the required limits trains."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from elastic.errors import SettingsError
from elastic.launch import limits
from elastic.launch.limits import JobLimits
from tests.etcd_access import etcd_with
from tests.recovery import trainings


def test_what_is_enough_is_enough() -> None:
    enough = JobLimits(memory_bytes=limits.MEMORY_BYTES, files=limits.FILES + 2 * limits.FILES_PER_WORKER, disk_bytes=limits.DISK_BYTES)
    assert enough.too_small(2) is None
    assert JobLimits().too_small(1000) is None


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            JobLimits(memory_bytes=1_024_000_000),
            "needs 1250 MB of address space before it has a model, and may have 1024 MB: raise `ulimit -v`",
        ),
        (JobLimits(files=43), "a job with 2 workers needs 44 open files, and a process may have 43: raise `ulimit -n`"),
        (JobLimits(disk_bytes=500_000, directory="/x"), "needs 1 MB on disk, and /x has 0 MB free: .* TMPDIR or directory="),
        (JobLimits(disk_files=3, directory="/x"), "needs room for 16 files on disk, and /x has room for 3 free: .* TMPDIR or directory="),
    ],
)
def test_what_is_too_small_is_named(found: JobLimits, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JobLimits, "here", lambda directory: found)
    for directory in (None, str(tmp_path), str(tmp_path / "not" / "yet" / "there")):
        with pytest.raises(SettingsError, match=said):
            limits.check(2, directory)


def test_without_a_temporary_directory_the_place_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "nowhere")])
    with pytest.raises(SettingsError, match=r"no temporary directory can be written to: set TMPDIR .* or use directory="):
        limits.check(2, None)
    limits.check(2, str(tmp_path))


PROGRAM = "import elastic; elastic.run('tests.recovery.trainings:train', workers=2, args=[%r, %r, 8, None, 0.0, None, False], etcd=%r)"


def limited(directory: Path, kind: int, value: int, etcd: str | None) -> subprocess.CompletedProcess[str]:
    """A program that runs a job, with a limit of its own."""
    job = PROGRAM % (str(directory), next(iter(trainings.CASES)), etcd)
    program = f"import resource; resource.setrlimit({kind}, ({value}, {value})); {job}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=100)


@pytest.mark.slow
@pytest.mark.usefixtures("leftovers")
@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (resource.RLIMIT_AS, 1_000_000_000, "each process of a job needs 1250 MB"),
        (resource.RLIMIT_NOFILE, 40, "a job with 2 workers needs 44 open files"),
        (resource.RLIMIT_NOFILE, 128, "the private etcd needs 160 open files"),
        (resource.RLIMIT_FSIZE, 10_000_000, "the private etcd needs files of 64 MB"),
    ],
)
def test_a_job_under_a_limit_that_is_too_small_ends_at_once(tmp_path: Path, kind: int, value: int, said: str) -> None:
    done = limited(tmp_path, kind, value, None)
    assert done.returncode == 1
    assert said in done.stderr.splitlines()[-1]
    assert done.stderr.count("Traceback") == 1, "the program's own"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("leftovers")
@pytest.mark.parametrize(
    ("kind", "value"),
    [(resource.RLIMIT_AS, limits.MEMORY_BYTES), (resource.RLIMIT_NOFILE, limits.FILES + 2 * limits.FILES_PER_WORKER)],
)
def test_a_job_that_has_just_enough_runs(tmp_path: Path, kind: int, value: int) -> None:
    with etcd_with(tmp_path / "external") as etcd:
        done = limited(tmp_path, kind, value, str(etcd.endpoint()))
    assert (done.returncode, done.stderr) == (0, "")
