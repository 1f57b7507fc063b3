"""Tests `elastic plan` for a train function, and jobs that start with the plan it saved."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import elastic
from elastic.errors import PlanError
from elastic.plan.saved import SavedPlan, load, save
from elastic.view import View
from tests.announcement import LAYERS
from tests.process import functions

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("leftovers")]

ROOT = Path(__file__).resolve().parents[2]
ANNOUNCES = "tests.process.functions:announces"


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "elastic.cli.main", *words], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )


@pytest.mark.long
def test_a_plan_for_this_machine_is_saved_and_run(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    done = command("plan", ANNOUNCES, "--workers", "3", "--stages", "2", "--save", str(path), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    shown, saved = json.loads(done.stdout), load(path)
    assert SavedPlan.from_json(shown["plan"]) == saved
    assert len(set(saved.hosts)) == 1
    assert [sum(grains for *_, grains in stage["members"]) for stage in shown["stages"]] == [8, 8]
    assert all(0 < stage["memory_bytes"] < stage["memory_limit_bytes"] for stage in shown["stages"])
    ran = command("run", ANNOUNCES, "--workers", "3", "--plan", str(path))
    assert ran.returncode == 0, ran.stderr
    view = View.from_json(json.loads(ran.stdout)["view"])
    assert (view.plan.stages, view.plan.routes) == (saved.plan.stages, saved.plan.routes)
    assert "as saved" in view.plan.why


@pytest.mark.long
def test_a_job_begins_with_what_the_file_says_and_not_with_the_planner_s_own(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    text = f"""
version = 1
step_s = 1.0
why = "by hand"
step = {{ micro_batches = 8 }}
model = {{ parameter_bytes = {[4 * 4096] * LAYERS} }}
members = {{ hosts = ["here", "here", "here"] }}
[[stages]]
layers = [0, 1]
members = [1, 2]
member_of_grain = [1, 1, 1, 1, 1, 1, 2, 1]
[[stages]]
layers = [1, {LAYERS}]
members = [0]
member_of_grain = [0, 0, 0, 0, 0, 0, 0, 0]
"""
    path.write_text(text)
    view = View.from_json(elastic.run(functions.announces, workers=3, plan=path).value["view"])
    assert view.plan.summary == "[0-0]x2 [1-3]x1"
    assert view.plan.routes[0] == (1, 1, 1, 1, 1, 1, 2, 1)
    path.write_text(text.replace("16384", "16000", 1))
    with pytest.raises(PlanError, match="its model's layer 0 has 16000 bytes of parameters, and this job's 16384"):
        elastic.run(functions.announces, workers=3, plan=path)


@pytest.mark.long
def test_what_is_found_for_a_cluster_like_this_machine_runs_here(tmp_path: Path) -> None:
    cluster, workload, path = tmp_path / "cluster.toml", tmp_path / "work.json", tmp_path / "plan.toml"
    cluster.write_text(
        """
        kinds = [{ name = "core", memory_bytes = 8e9 }]
        hosts = [{ name = "here", zone = "z", kind = "core", count = 4 }]
        links.levels.within_host.bytes_per_s = 1e9
        links.levels.within_zone.bytes_per_s = 1e9
        """
    )
    seconds = [{"kind": "core", "size": 1, "tp": 1, "layers": [[0.01, 0.02, 0.0]] * LAYERS}]
    work = {"batch": 8, "seconds": seconds, "bytes": [{"tp": 1, "layers": [[16384, 1000, 100]] * LAYERS}]}
    workload.write_text(json.dumps(work))
    done = command("plan", "--cluster", str(cluster), "--workload", str(workload), "--save", str(path))
    assert done.returncode == 0, done.stderr
    saved = load(path)
    view = View.from_json(elastic.run(functions.announces, workers=len(saved.hosts), plan=path).value["view"])
    assert (view.plan.stages, view.plan.routes) == (saved.plan.stages, saved.plan.routes)


def test_what_can_be_refused_before_anything_is_started_is(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    files = ("--cluster", "examples/clusters/mixed.toml", "--workload", "examples/clusters/gpt-1.3b.toml")
    done = command("plan", *files, "--save", str(path))
    assert done.returncode == 0, done.stderr
    with pytest.raises(PlanError, match="is for 16 workers, and workers=3"):
        elastic.run(functions.announces, workers=3, plan=path)
    with pytest.raises(PlanError, match=r"has 4 stages, and stages=2: leave stages= out"):
        elastic.run(functions.announces, workers=16, stages=2, plan=path)
    save(load(path), path)
    path.write_text(path.read_text().replace("version = 1", "version = 2"))
    done = command("run", ANNOUNCES, "--workers", "16", "--plan", str(path))
    assert done.returncode == 2
    assert "version is 2, and this elastic reads version 1: make the plan again" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tests.process.functions:facts", '"x"', "1"), "returned without making a Trainer: there is nothing to plan"),
        ((), "give either a train function"),
        ((ANNOUNCES, "--cluster", "examples/clusters/mixed.toml"), "give either a train function"),
    ],
)
def test_what_cannot_be_planned_is_one_line(words: tuple[str, ...], said: str) -> None:
    done = command("plan", *words)
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
