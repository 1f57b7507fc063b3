"""Tests whole runs: real jobs under real faults, and what is said of them."""

from __future__ import annotations

import datetime
import json
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from elastic.chaos import scenario, trial
from elastic.chaos.injection import Injection, parse
from elastic.chaos.oracles import FAIL, PASS, UNKNOWN
from elastic.chaos.schedule import JobSpec, Schedule
from elastic.cli.main import app
from tests.chaos import scripts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("leftovers")]

TODAY = datetime.datetime.now(datetime.timezone.utc).date().toordinal()
SCRIPT = f"{scripts.__file__}"


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Undisturbed runs are kept for this session alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "calm"))


def ran(*faults: str, **job: Any) -> trial.Record:
    """Runs the job with these faults."""
    spec = JobSpec.from_json({"workers": 2, "steps": 30, **job})
    return trial.run(Schedule(job=spec, injections=tuple(map(parse, faults))), print)


def passes(record: trial.Record) -> trial.Record:
    assert (record.verdict, record.reasons) == (PASS, []), [host.log[-3000:] for host in record.evidence.hosts]
    return record


def test_two_faults_of_today():
    generator = random.Random(TODAY)
    kinds = generator.sample(["kill", "kill-many", "corrupt", "etcd-restart", "slow"], 2)
    faults = [Injection(kind=kind, step=6 + 8 * at, place=generator.randrange(2), host=0) for at, kind in enumerate(kinds)]
    short = [str(each) + (" seconds=1" if each.kind == "slow" else "") for each in faults]
    record = ran(*short, args=[1_000_000, 0.0], steps=20)
    assert record.verdict == PASS, (f"seed {TODAY}", short, record.reasons)
    assert len(record.evidence.steps) == 20


ONE_HOST = [
    ["kill@8:backward place=1", "kill@20:apply"],
    ["kill-many@8 count=9"],
    ["stop@8 place=1 seconds=3"],
    ["slow@8 place=1 seconds=2 factor=5"],
    ["kill-during-recovery@8:migrate"],
    ["kill-during-recovery@8"],
    ["kill-joiner@8 place=1"],
    ["corrupt@8 place=1", "corrupt@18"],
    ["etcd-restart@8"],
    ["etcd-down@8 seconds=2", "kill@10"],
    ["etcd-full@8 seconds=2", "kill@10"],
]


@pytest.mark.long
@pytest.mark.parametrize("faults", ONE_HOST, ids=" ".join)
def test_faults_on_one_host(faults: list[str]):
    record = passes(ran(*faults, workers=3, steps=60))
    assert len(record.evidence.steps) == 60
    assert all(effect.proof for effect in record.evidence.effects)


@pytest.mark.long
def test_another_host_joins():
    record = passes(ran("join@8", workers=2, steps=0, minutes=0.2))
    assert max(given.workers for given in record.evidence.steps.values()) == 4


@pytest.mark.long
def test_a_full_disk_with_saves():
    try:
        passes(ran("disk-full@8 seconds=2", workers=2, steps=80, checkpoint_every=10))
    except Exception as error:
        if "be root" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.long
@pytest.mark.parametrize("every", [0, 10])
def test_a_job_that_loses_its_only_host_is_started_again(every: int):
    record = passes(ran("agent-kill@25", steps=40, checkpoint_every=every))
    first, second = record.evidence.runs
    assert min(given.step for notes in second for given in notes.given) == (20 if every else 0)
    assert max(given.step for notes in first for given in notes.given) >= 24


TWO_HOSTS = [
    ["partition@8 host=1 seconds=5"],
    ["partition@8 host=0 seconds=5"],
    ["host-loss@8 host=1 settled=1"],
    ["agent-kill@8 host=0 settled=1"],
    ["drain@8 host=1 settled=1"],
    ["delay@8 host=1 factor=20 seconds=2", "kill@12"],
]


@pytest.mark.long
@pytest.mark.parametrize("faults", TWO_HOSTS, ids=" ".join)
def test_faults_of_two_hosts(faults: list[str]):
    passes(ran(*faults, hosts=2, workers=2, minutes=0.3, steps=0))


@pytest.mark.long
def test_all_hosts_are_lost_at_once():
    record = passes(
        ran("host-loss@25 host=0 seconds=1", "host-loss@25 host=1 seconds=1", hosts=2, workers=1, steps=40, checkpoint_every=10)
    )
    assert len(record.evidence.runs) == 2


@pytest.mark.long
def test_a_script_that_saves_by_itself_keeps_its_own_checkpoints(tmp_path: Path):
    own = tmp_path / "own"
    record = passes(ran("kill@8 place=1", "agent-kill@25", script=f"{SCRIPT}:saves", args=[str(own), 40], steps=0))
    _, second = record.evidence.runs
    assert min(given.step for notes in second for given in notes.given) % 5 == 0
    assert not own.exists()
    assert len(record.evidence.steps) == 40


@pytest.mark.long
def test_a_script_without_a_seed_passes_since_jobs_have_one():
    record = passes(ran("kill@8 place=1", script=f"{SCRIPT}:plain", args=[25], steps=0))
    assert len(record.evidence.steps) == 25


@pytest.mark.long
def test_a_script_that_is_not_exact_is_compared_within_a_tolerance():
    record = passes(ran("kill@8 place=1", script=f"{SCRIPT}:inexact", args=[25], steps=0))
    (losses,) = [each for each in record.findings if each.oracle == "losses"]
    assert "exact=False" in losses.reason


@pytest.mark.long
def test_a_script_that_is_not_repeatable_is_unknown(tmp_path: Path):
    record = ran("kill@8 place=1", script=f"{SCRIPT}:different_each_time", args=[str(tmp_path), 20], steps=0)
    assert record.verdict == UNKNOWN
    assert all("not repeatable" in reason for reason in record.reasons)


@pytest.mark.long
def test_a_script_that_fails_by_itself_fails():
    record = ran(script=f"{SCRIPT}:fails", args=[20], steps=0)
    assert record.verdict == FAIL
    assert "it fails without faults" in record.reasons[0]


@pytest.mark.long
def test_the_command_runs_and_replays(tmp_path: Path):
    report, page, again = tmp_path / "r.json", tmp_path / "r.html", tmp_path / "again.json"
    words = ["chaos", "run", "--workers", "2", "--minutes", "0.1", "--fault", "kill@5:backward", "--fault", "stop@12 seconds=2"]
    first = CliRunner().invoke(app, [*words, "--json", str(report), "--html", str(page)])
    assert first.exit_code == 0, first.output
    second = CliRunner().invoke(app, ["chaos", "replay", str(report), "--json", str(again)])
    assert second.exit_code == 0, second.output
    one, other = (json.loads(path.read_text()) for path in (report, again))
    assert one["schedule"] == other["schedule"]
    assert [fault["kind"] for fault in one["faults"]] == ["kill", "stop"]
    assert one["verdict"] == "pass"
    assert "kill@5:backward" in page.read_text()


@pytest.mark.long
def test_the_command_shrinks_a_schedule_that_fails(tmp_path: Path):
    report, smallest, page = tmp_path / "r.json", tmp_path / "smallest.toml", tmp_path / "s.html"
    words = ["run", "--script", f"{SCRIPT}:fails_after_a_loss", "--arg", "30", "--workers", "2", "--minutes", "1", "--json", str(report)]
    faults = ["slow@4 seconds=0.3", "kill@8:backward place=1", "etcd-restart@4"]
    first = CliRunner().invoke(app, ["chaos", *words, *(word for fault in faults for word in ("--fault", fault))])
    assert first.exit_code == 1, first.output
    assert "it cannot bear another epoch" in first.output
    ended = CliRunner().invoke(app, ["chaos", "shrink", str(report), "--out", str(smallest), "--html", str(page)])
    assert ended.exit_code == 0, ended.output
    assert f"1 of 3 faults are enough: elastic chaos run {smallest}" in ended.output
    assert [str(each) for each in scenario.load(smallest).injections] == ["kill@8:backward place=1"]
    assert "The smallest schedule that fails" in page.read_text()


@pytest.mark.long
def test_a_script_that_makes_no_trainer_fails_with_the_reason():
    record = ran("kill@3", script=f"{SCRIPT}:makes_no_trainer", steps=0)
    assert record.verdict == UNKNOWN
    assert "took effect: kill@3: the job ended before it was due" in record.reasons[0]
    assert any("no step was given to any loop" in reason for reason in record.reasons)
    assert any("the job ended without an elastic.Trainer, so nothing was trained" in reason for reason in record.reasons)


BAD = [
    (["run", "--fault", "explode@3"], "there is no fault 'explode'"),
    (["run", "--faults", "kill,explode"], "there is no fault 'explode'"),
    (["run", "--fault", "partition@3"], "give --hosts 2"),
    (["run", "--fault", "kill@3", "--faults", "kill"], "give either"),
    (["run", "--mtbf", "0"], "mean time between faults"),
    (["run", "--script", "nothing.py:train"], "there is no file"),
    (["run", "nothing.toml"], "cannot be read"),
    (["replay", "nothing.json"], "cannot be read"),
    (["shrink", "nothing.json"], "cannot be read"),
    (["run", "--minutes", "-1"], "minutes=-1"),
    (["run", "--faults", " , "], "--faults names no kind"),
    (["run", "--fault", "kill@3 place=3"], "there is no worker at place 3: the job has 3"),
    (["run", "--minutes", "0.01"], "no fault at a mean distance of 6 s fits into 0.01 minutes"),
    (["run", "--fault", "kill@3", "--keep", "/proc/none/x"], "--keep /proc/none/x: files cannot be kept there"),
    (["run", "--patience", "0"], "Invalid value for '--patience'"),
    (["run", "--fault", "kill@3", "--html", "/proc/none/r.html"], "the report cannot be written to /proc/none/r.html"),
    (["run", "--fault", "kill@3", "--keep", "/proc"], "--keep /proc: files of a run are kept in a new or empty folder"),
    (["run", "--fault", "kill@3", "--reference", "none.json"], "there is no undisturbed run in this file"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_bad_input_is_refused_at_once(words: list[str], message: str):
    result = CliRunner().invoke(app, ["chaos", *words])
    assert result.exit_code == 2, result.output
    assert message in result.output


def test_the_list_has_every_fault():
    from elastic.chaos.kinds import KINDS

    found = json.loads(CliRunner().invoke(app, ["chaos", "list", "--json"]).output)
    assert [each["name"] for each in found] == list(KINDS)
    assert all(each["injected"] for each in found)
