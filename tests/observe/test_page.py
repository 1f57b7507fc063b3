"""The report page and the table of `elastic top`."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from elastic.errors import SettingsError
from elastic.host.rundir import RunDirectory
from elastic.observe import top
from elastic.observe.drawing import round_step, thinned
from elastic.observe.incident import Incident
from elastic.observe.journal import Journal
from elastic.observe.page import page
from elastic.observe.step_log import StepLog
from tests.observe.test_journal import step


class Tags(HTMLParser):
    """Fails at a tag that is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "rect", "line", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "line", "polyline"):
            assert self.open.pop() == tag


@pytest.fixture
def directory(tmp_path) -> RunDirectory:
    found, at = RunDirectory(tmp_path), iter(float(second) for second in range(100))
    journal = Journal(found.events, lambda: next(at))
    journal.note("begun", job="<b>mine</b>", pid=1)
    journal.note("view", epoch=1, layout="[0-1]x2", workers=[0, 1])
    journal.incident(Incident(kind="death", worker=1, step=4, phases_ms={"quiesce": 2.0}, stall_ms=40.0, why="<script>"))
    journal.note("view", epoch=2, layout="[0-1]x1", workers=[0])
    journal.said("host a & b joins")
    journal.note("ended", outcome="failed", why="a wrong turn")
    StepLog(found.steps).new([step(number, at=1.0 + number, of=9) for number in range(8)], memory=10**9, memory_sum=2 * 10**9)
    return found


def test_the_page_shows_the_run_and_needs_no_network(directory):
    text = page(directory)
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.links == []
    assert not re.search(r"https?://|@import|url\(", text)
    assert "&lt;b&gt;mine&lt;/b&gt;" in text
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert '<span class="verdict fail">failed</span>' in text
    shown = re.sub(r"<[^>]*>", " ", text)
    for words in ("8 of 9", "1 GB", "a wrong turn", "1: [0-1]x2", "worker 1 died in step 4", "host a &amp; b joins", "death, step 4"):
        assert words in shown, words
    assert text.count("<polyline") == 3, "loss, throughput, memory"


def test_the_page_shows_mfu_or_if_the_peak_is_unknown_the_rate(directory):
    assert "MFU" not in page(directory)
    log, more = StepLog(directory.steps), {"of": 9, "seconds": 0.5, "flops": 10**9}
    log.new([step(number, at=20.0 + number, **more) for number in range(8, 12)])
    assert "<b>2 GFLOP/s</b>" in page(directory)
    log.new([step(number, at=20.0 + number, **more, peak_flops=8e9) for number in range(12, 20)])
    text = page(directory)
    assert "<b>25.0%</b>" in text
    assert "MFU, over time" in text
    assert text.count("<polyline") == 4


def test_a_run_without_a_step_has_a_page_too(tmp_path):
    Journal(tmp_path / "events.jsonl").note("view", epoch=1, layout="[0]x1", workers=[0])
    assert "No step was committed." in page(RunDirectory(tmp_path))
    with pytest.raises(SettingsError, match="has nothing to report"):
        page(RunDirectory(tmp_path / "nowhere"))


def test_a_run_that_ended_before_it_had_workers_has_a_page_too(tmp_path):
    directory = RunDirectory(tmp_path)
    journal = Journal(directory.events)
    journal.note("begun", job="mine", pid=1)
    journal.keep()
    journal.note("ended", outcome="failed", why="no etcd")
    made = page(directory)
    Tags().feed(made)
    assert "no etcd" in made


def test_many_points_are_thinned_without_losing_peaks():
    points = [(float(x), 100.0 if x == 5_001 else -7.0 if x == 2 else 1.0) for x in range(10_000)]
    found = thinned(points)
    assert len(found) <= 1000
    assert (5001.0, 100.0) in found
    assert (2.0, -7.0) in found
    assert found == sorted(found)


@pytest.mark.parametrize(("most", "step"), [(40, 5), (0.86, 0.2), (1, 0.2), (0.0, 2e-10)])
def test_a_scale_has_round_steps(most, step):
    assert round_step(most, 8 if most == 40 else 5) == pytest.approx(step)


def worker(number: int, **more: Any) -> dict[str, Any]:
    figures = {"step_s": 0.5, "memory": 10**9, "for_s": 0.01, "state": "S", "place": "runtime", "waits_for": None, "pid": 1}
    return {"worker": number, "host": "a", "spare": False, "phase": "forward", "step": 5, "micro_batch": 2, **figures, **more}


def live(*workers: dict[str, Any]) -> dict[str, Any]:
    job = {"job": "mine", "phase": "running", "at": 0.0, "epoch": 1, "step": 5, "of": 10, "loss": 1.0, "seconds": 0.5, "incidents": 0}
    host = {"name": "a", "room": 2, "spares": 0, "rack": None, "draining": False}
    rest = {
        "samples_per_second": 16.0,
        "tokens_per_second": 0.0,
        "flops_per_second": 0.0,
        "mfu": None,
        "layout": "[0-1]x2",
        "coordinator": "a",
        "hosts": [host],
    }
    return {**job, **rest, "stages": [[0, 2, [0, 1]]], "workers": [*workers], "links": [[0, 1, 0.001, 1e9]]}


def text_of(found: dict[str, Any], height: int = 0, now: float | None = 1.0) -> str:
    console = Console(width=120, no_color=True)
    with console.capture() as captured:
        console.print(top.shown(found, ["an event"], height, now=now))
    return captured.get()


def test_top_shows_workers_links_and_events():
    text = text_of(live(worker(0), worker(1, phase="ready", micro_batch=None, waits_for=0)))
    for words in ("step 6 of 10  loss 1.0000", "forward 2", "ready, waits for 0", "0-1 1 GB/s, 1 ms", "an event", "2 GB in all"):
        assert words in text, words
    assert "FLOP" not in text
    assert "16.0 samples/s  3 GFLOP/s (12.5% MFU)" in text_of({**live(), "flops_per_second": 3e9, "mfu": 0.125})
    assert "16.0 samples/s  3 GFLOP/s\n" in text_of({**live(), "flops_per_second": 3e9})
    assert "as of 9 s ago" in text_of(live(), now=9.0)
    assert "mine: has ended" in text_of(live(), now=None)


def test_the_workers_of_a_job_that_has_ended_do_nothing():
    found = live(worker(0), worker(1, state="T", waits_for=0))
    assert "is stopped" in text_of(found)
    text = text_of(found, now=None)
    assert text.count("has ended") == 3
    assert not any(words in text for words in ("is stopped", "forward", "waits for", "10 ms"))


@pytest.mark.parametrize(("rate", "shown"), [(110_600.0, "111 kFLOP/s"), (999.0, "999 FLOP/s"), (2.5e13, "25 TFLOP/s")])
def test_rates_have_units(rate, shown):
    assert f"  {shown}\n" in text_of({**live(), "flops_per_second": rate})


@pytest.mark.parametrize(("workers", "shown"), [(0, "a: no worker"), (1, "a: 1 worker"), (2, "a: 2 workers")])
def test_workers_are_counted(workers, shown):
    assert re.search(rf"{shown}\b", text_of(live(*(worker(number) for number in range(workers)))))


def test_of_many_workers_those_in_trouble_are_shown_first():
    found = live(*(worker(number, state="T" if number == 150 else "S", step_s=2.0 if number == 90 else 0.5) for number in range(200)))
    lines = text_of(found, height=24).splitlines()
    assert len(lines) <= 24
    first = next(place for place, line in enumerate(lines) if line.startswith("worker")) + 1
    assert [line.split()[0] for line in lines[first : first + 3]] == ["90", "150", "0"]
    assert "is stopped" in lines[first + 1]
    assert any("more" in line for line in lines)
    assert json.dumps(found)
