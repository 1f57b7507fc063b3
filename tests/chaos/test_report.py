"""Tests the report: its JSON can be read back, and its page has what it should and needs nothing from elsewhere."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from elastic.chaos import figures
from elastic.chaos.evidence import Evidence
from elastic.chaos.html import page
from elastic.chaos.oracles import judge
from elastic.chaos.report import load, report, write
from elastic.chaos.scene import Effect
from elastic.chaos.trial import Record
from elastic.errors import SettingsError
from tests.chaos.evidence import STEPS, fine, incident, notes

PHASES = {"quiesce": 20.0, "propose": 5.0, "migrate": 30.0, "gate": 1.0, "commit": 4.0}


def evidence() -> Evidence:
    """A run with one incident, and a fault of which nothing shows that it took effect."""
    known = fine()
    more = {"at": 50.81, "place": 1, "phase": "backward", "detected_ms": 3.0, "phases_ms": PHASES, "redo_ms": 100.0, "restored": None}
    unproven = Effect(known.effects[0].injection, at=51.5, why="<it> had ended")
    return replace(known, incidents=(incident(**more),), effects=(*known.effects, unproven))


def data(**changes: Any) -> dict[str, Any]:
    known = evidence()
    return {**report(Record(evidence=known, findings=judge(known), harness_cpu_s=0.1)), **changes}


def test_a_report_is_json_and_is_read_back(tmp_path: Path):
    made = data()
    write(tmp_path / "r.json", made)
    schedule, again = load(tmp_path / "r.json")
    assert schedule == evidence().schedule
    assert again == json.loads(json.dumps(made))
    assert (made["verdict"], made["steps"], made["runs"]) == ("unknown", 20, 1)
    assert [fault["at"] for fault in made["faults"]] == [0.8, 1.5]
    assert [each["epoch"] for each in made["layouts"]] == [1, 2]
    assert made["stalls"] == [{"at": pytest.approx(0.7), "step": 8, "seconds": pytest.approx(0.5), "kinds": ["kill"]}]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ('{"job": 3}', "job=3: a job is a table of script"),
        ('{"job": null}', "job=None: a job is a table"),
        ('{"faults": 3}', "each fault is a table"),
        ('{"faults": null}', "each fault is a table"),
        ('{"faults": [{"kind": "kill", "step": 3, "place": null}]}', "place=None is not a number"),
    ],
)
def test_a_report_that_was_edited_wrongly_is_refused_with_its_file(tmp_path: Path, schedule: str, message: str):
    (tmp_path / "r.json").write_text(f'{{"form": 1, "schedule": {schedule}}}')
    with pytest.raises(SettingsError) as caught:
        load(tmp_path / "r.json")
    assert str(caught.value).startswith(f"{tmp_path / 'r.json'}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"form": 0, "schedule": {}}'])
def test_what_is_no_report_is_refused(tmp_path: Path, text: str):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(SettingsError, match="is no report"):
        load(tmp_path / "r.json")


def test_goodput_is_what_was_done_of_what_the_living_could_have_done():
    found = figures.goodput(fine(processors=2))
    assert found is not None
    assert found.steps == 20
    assert found.seconds == pytest.approx(2.4)
    assert found.possible == pytest.approx(1.0 * 10 + 1.4 * 5), "10 steps a second with two members, half of that with one"
    assert found.share == 1.0
    alone = figures.goodput(fine(processors=1))
    assert alone is not None
    assert alone.possible == pytest.approx(2.4 * 10), "on one processor, one member is as fast as two"
    slow = figures.Goodput(steps=9, seconds=2.4, possible=18.0, rates={})
    assert slow.share == 0.5


def test_a_host_that_hears_of_a_view_late_does_not_bring_lost_members_back():
    known = fine(processors=2)
    late = replace(known.seen, views=[*known.seen.views, (51.1, 1, 1, (0, 1)), (51.2, 1, 2, (0,))])
    assert figures.goodput(replace(known, seen=late)) == figures.goodput(known)


def test_a_job_that_is_started_again_counts_its_views_anew():
    known = fine(processors=2)
    again = notes(5, range(8, STEPS), run="b", began=51.1)
    views = [*known.seen.views, (51.2, 0, 1, (5, 6))]
    found = figures.goodput(replace(known, workers=(*known.workers, again), seen=replace(known.seen, views=views)))
    assert found is not None
    assert found.possible == pytest.approx(1.0 * 10 + 0.2 * 5 + 1.2 * 10)


def test_the_page_needs_nothing_from_elsewhere_and_escapes_what_it_shows():
    text = page(data(), "r.json")
    assert not re.findall(r"https?://|src=|<link|<script|@import|url\(", text)
    assert "&lt;it&gt; had ended" in text
    assert "<it>" not in text
    assert "elastic chaos replay r.json" in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert ElementTree.fromstring(svg).tag == "svg"
    assert text.count("<svg") == 3
    assert "migrate: 30.0 ms" in text
    assert "prefers-color-scheme: dark" in text


def test_the_page_has_the_smallest_schedule_that_fails():
    shrunk = fine().schedule.to_json()
    text = page(data(shrunk=shrunk))
    assert "smallest.toml" in text
    assert text.count("kind = &#34;kill&#34;") == 2


def test_the_page_of_a_run_in_which_nothing_happened():
    text = page(data(incidents=[], stalls=[], faults=[], speed=[], layouts=[], goodput=None, step_s=None))
    assert "There were none." in text


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("width", [1280, 480])
def test_a_browser_shows_the_page_without_errors(tmp_path: Path, width: int):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("needs chromium")
    (tmp_path / "r.html").write_text(page(data(), "r.json"))
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000"]
    command = [browser, *flags, "--enable-logging=stderr", f"--screenshot={tmp_path / 'r.png'}", (tmp_path / "r.html").as_uri()]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert (tmp_path / "r.png").stat().st_size > 20_000, ended.stderr
    assert "CONSOLE" not in ended.stderr
