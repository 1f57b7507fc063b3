"""Runs the example as a user does: a tiny real job with agent, etcd, fork server and workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import Leftovers

ROOT = Path(__file__).parents[2]
TINY = ["--layers", "3", "--dim", "32", "--heads", "2", "--seq", "32", "--batch", "16", "--micro-batch", "2"]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("leftovers")]


def gpt(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / "gpt.py"), *TINY, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.long
def test_reports_of_two_layouts_agree_and_say_who_did_what(tmp_path: Path) -> None:
    reports = []
    for workers, stages in [("1", "1"), ("3", "2")]:
        file = tmp_path / f"{workers}.json"
        options = ["--workers", workers, "--stages", stages, "--steps", "4", "--dropout", "0.1", "--tie", "--bf16", "--clip", "1"]
        done = gpt(*options, "--report", str(file))
        assert done.returncode == 0, done.stderr
        reports.append(json.loads(file.read_text()))
        assert f"digest {reports[-1]['digest']}" in done.stdout
        assert "4 of 4 steps done  loss " in done.stdout
    one, three = reports
    assert one["digest"] == three["digest"]
    assert one["losses"] == three["losses"]
    assert len(set(one["losses"])) == one["steps"] == 4
    assert one["layouts"] == ["[0-4]x1"]
    assert len(three["workers"]) == 3
    for layer in range(5):
        assert sum(sum(w["micro_batches"].values()) for w in three["workers"] if layer in w["layers"]) == 8 * 4
    assert sum(w["owned_parameter_bytes"] for w in three["workers"]) == one["workers"][0]["owned_parameter_bytes"]
    for worker in three["workers"]:
        assert min(worker[name] for name in ("parameter_bytes", "optimizer_bytes", "gradient_buffer_bytes", "peak_rss_bytes")) > 0


@pytest.mark.long
def test_deferred_initial_values_are_equal_on_any_layout_and_after_any_kill(tmp_path: Path) -> None:
    runs = [
        ["--workers", "1", "--stages", "1"],
        ["--workers", "4", "--stages", "2", "--kill", "1@2", "--kill", "0@4:reduce"],
        ["--workers", "3", "--stages", "3", "--kill", "0@0", "--kill", "1@3"],
    ]
    reports = []
    for options in runs:
        file = tmp_path / f"{len(reports)}.json"
        done = gpt("--init", "deferred", "--tie", "--dropout", "0.1", "--steps", "6", *options, "--report", str(file))
        assert done.returncode == 0, done.stderr
        reports.append(json.loads(file.read_text()))
    assert len({report["digest"] for report in reports}) == 1
    assert reports[0]["losses"] == reports[1]["losses"] == reports[2]["losses"]
    assert [len(report["incidents"]) > 0 for report in reports] == [False, True, True]


@pytest.mark.long
def test_another_layout_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    runs = [
        ("whole", ["--workers", "1", "--stages", "1", "--steps", "6"]),
        ("first", ["--workers", "2", "--stages", "1", "--steps", "4", "--checkpoint", f"{tmp_path}/run", "--checkpoint-every", "2"]),
        ("then", ["--workers", "2", "--stages", "2", "--steps", "6", "--checkpoint", f"file://{tmp_path}/run", "--keep", "1"]),
    ]
    reports = {}
    for name, options in runs:
        done = gpt(*options, "--report", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
        reports[name] = json.loads((tmp_path / name).read_text())
    assert reports["first"]["losses"] + reports["then"]["losses"] == reports["whole"]["losses"]
    assert (reports["then"]["first_step"], reports["then"]["steps"]) == (4, 2)
    assert reports["then"]["digest"] == reports["whole"]["digest"]
    assert [path.name for path in sorted((tmp_path / "run").glob("step-*"))] == ["step-00000006"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            ["--batch", "15"],
            "15 samples cannot be cut into micro-batches of 2: choose a multiple of it, such as 14 or 16",
            marks=pytest.mark.long,
        ),
        pytest.param(["--workers", "6", "--stages", "6"], "6 stages", marks=pytest.mark.long),
        (["--workers", "2", "--stages", "3"], "stages=3 needs at least 3 workers"),
    ],
)
def test_bad_input_ends_with_one_clear_message(options: list[str], message: str) -> None:
    done = gpt("--steps", "2", *options)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_ctrl_c_stops_at_the_step_boundary_with_a_report(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    command = [sys.executable, "-u", str(ROOT / "examples" / "gpt.py"), *TINY, "--steps", "100000", "--report", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "1 of 100000 steps done" in process.stdout.readline()
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopping at the next step boundary" in err
    report = json.loads(file.read_text())
    assert 1 <= report["steps"] == len(report["losses"]) < 100000
    assert report["digest"] in out


@pytest.mark.long
def test_after_sigterm_the_next_start_goes_on_with_the_same_bits(tmp_path: Path, leftovers: Leftovers) -> None:
    command = [sys.executable, str(ROOT / "examples" / "gpt.py"), *TINY, "--workers", "3", "--stages", "2", "--steps", "60", "--checkpoint"]
    ends = {}
    for name in ("launcher", "everywhere", "whole"):
        directory = tmp_path / name
        if name != "whole":
            stopped = subprocess.Popen([*command, str(directory)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            assert stopped.stdout is not None
            assert stopped.stdout.readline().startswith("1 of 60 steps done ")
            for pid in [stopped.pid] if name == "launcher" else list(leftovers.processes()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            _, said = stopped.communicate(timeout=60)
            assert stopped.returncode == 143, said
            slow = "asked to stop"  # on a busy machine
            lines = [line for line in said.splitlines() if "the private etcd was killed by SIGTERM" not in line and slow not in line]
            assert lines == ["elastic: SIGTERM: stopping at the next step boundary; send it again to stop at once"]
            assert (leftovers.processes(), leftovers.files()) == ({}, [])
            (saved,) = (path.name for path in directory.glob("step-*"))
            assert 1 <= int(saved.removeprefix("step-")) < 60
        done = subprocess.run([*command, str(directory)], capture_output=True, text=True, timeout=120, check=True)
        ends[name] = done.stdout.splitlines()[-1]
    assert ends["whole"].startswith("digest ")
    assert set(ends.values()) == {ends["whole"]}
