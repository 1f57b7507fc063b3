"""Tests of `energy.json`, and of what `elastic energy` makes of it."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest
from typer.testing import CliRunner

from elastic.cli.main import app
from elastic.errors import SettingsError
from elastic.power import energy_file
from tests.power.test_cycle import begun, finished

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def content():
    cycle, gpus, _ = begun("energy")
    finished(cycle, gpus)
    gpus.run(cycle, 20)
    return json.loads(
        json.dumps(energy_file.described("gpt", cycle, 1000, {"GPU-9": "its energy counter stands still"}, tuple(cycle.frontier())))
    )


def test_stages_add_up_to_the_step(content):
    assert content["now"]["joules"] == pytest.approx(sum(stage["joules"] for stage in content["stages"]))
    assert content["now"]["joules_per_token"] == content["now"]["joules"] / 1000
    assert [stage["layers"][0] for stage in content["stages"]] == sorted(stage["layers"][0] for stage in content["stages"])


def test_a_job_is_found_by_its_directory_and_by_its_name(content, tmp_path):
    own, other = tmp_path / "own", tmp_path / "elastic-x"
    for directory, job in ((own, "gpt"), (other, "bert")):
        directory.mkdir()
        energy_file.write(directory, {**content, "job": job})
    assert energy_file.read(str(own), tmp_path)["job"] == "gpt"
    assert energy_file.read("bert", tmp_path)["job"] == "bert"
    with pytest.raises(SettingsError, match=r"no energy figures of a job 'gpt' .*\(job\.use_gpu\)"):
        energy_file.read("gpt", tmp_path)


@pytest.mark.parametrize("text", ["", "{", "\x00", "[]", "7", "{}", '{"job": "gpt"}', pytest.param("[" * 100_000, id="nested")])
def test_a_damaged_file_counts_as_none(tmp_path, text):
    (tmp_path / energy_file.NAME).write_text(text)
    with pytest.raises(SettingsError):
        energy_file.read(str(tmp_path), tmp_path)


@pytest.mark.parametrize("field", ["now", "usual", "predicted", "stages", "models", "frontier"])
def test_a_file_of_another_version_is_an_error_of_the_command(content, tmp_path, field):
    energy_file.write(tmp_path, {**content, field: [{"other": 1}]})
    shown = CliRunner().invoke(app, ["energy", str(tmp_path), "--svg", str(tmp_path / "x.svg")])
    assert shown.exit_code == 1
    assert "they are damaged, or of another version" in shown.stderr


def test_a_number_that_no_float_holds_is_an_error_of_the_command(content, tmp_path):
    energy_file.write(tmp_path, {**content, "now": {**content["now"], "step_s": 10**400}})
    shown = CliRunner().invoke(app, ["energy", str(tmp_path)])
    assert shown.exit_code == 1
    assert "they are damaged, or of another version" in shown.stderr


def test_a_directory_that_is_gone_disturbs_nobody(content, tmp_path):
    energy_file.write(tmp_path / "gone", content)


def test_the_command_shows_stages_faults_and_the_frontier_and_draws_it(content, tmp_path):
    energy_file.write(tmp_path, content)
    drawn = tmp_path / "frontier.svg"
    shown = CliRunner().invoke(app, ["energy", str(tmp_path), "--svg", str(drawn)])
    assert shown.exit_code == 0
    for words in (
        "gpt, epoch 1, dvfs energy: held",
        "J a token",
        "with the usual clocks:",
        "GPU-9: not counted",
        "what other clocks would give",
    ):
        assert words in shown.output
    circles = ET.parse(drawn).getroot().findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == len(content["frontier"]) + 2  # and the usual and the chosen clocks
    nowhere = CliRunner().invoke(app, ["energy", str(tmp_path), "--svg", str(tmp_path / "no" / "x.svg")])
    assert nowhere.exit_code == 1
