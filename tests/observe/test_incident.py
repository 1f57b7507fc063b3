from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from elastic.errors import SettingsError
from elastic.observe.finding import Finding
from elastic.observe.incident import Incident, read, timeline
from elastic.observe.json_lines import append_lines

DEATH = Incident(
    kind="death",
    worker=1,
    place=1,
    step=8,
    phase="backward",
    epoch=2,
    attempts=1,
    detected_ms=0.9,
    phases_ms={"quiesce": 3.1, "propose": 4.0, "migrate": 12.5, "gate": 0.8, "commit": 2.2},
    lost_ms=184.0,
    running_ms=61.2,
    redo_ms=200.0,
    stall_ms=243.4,
    steps_redone=1,
    samples_lost=0,
    bytes_moved=8_600_000,
    bytes_minimum=8_600_000,
    links_kept=3,
    links_dropped=1,
    links_made=1,
    layout_before="[0-4]x2 [5-9]x2",
    layout_after="[0-3]x1 [4-9]x2",
)
OUTCOME = "\n  running again after 61 ms; lost 0.2 s of step 8, no sample lost, stalled 243 ms"


def lines(incident: Incident) -> list[str]:
    return timeline(incident).splitlines()


def test_a_death_in_four_lines() -> None:
    assert timeline(DEATH) == (
        "worker 1 (place 1) died in step 8, backward\n"
        "  +0.9 ms detected | quiesce 3.1 | propose 4.0 | migrate 12.5 | gate 0.8 | commit 2.2\n"
        "  [0-4]x2 [5-9]x2 -> [0-3]x1 [4-9]x2, 8.6 MB moved (the minimum), 3 links kept, 1 dropped, 1 made" + OUTCOME
    )


@pytest.mark.parametrize(
    ("changes", "headline"),
    [
        ({"also": (2,)}, "workers 1 and 2 died in step 8, backward"),
        ({"also": (2, 3), "phase": None}, "workers 1, 2 and 3 died in step 8"),
        ({"joined": (4,)}, "worker 1 (place 1) died in step 8, backward; worker 4 joined"),
        ({"place": None, "step": None}, "worker 1 died"),
        ({"worker": None}, "a worker died in step 8, backward"),
        (
            {"kind": "eviction", "why": "no CPU progress for 1 s"},
            "worker 1 (place 1) was evicted in step 8, backward: no CPU progress for 1 s",
        ),
        ({"kind": "eviction", "also": (0,)}, "workers 1 and 0 were evicted in step 8, backward"),
        ({"kind": "drain", "phase": None}, "worker 1 (place 1) left at step 8"),
        ({"kind": "join", "worker": 4, "step": 12, "phase": None, "joined": (4,)}, "worker 4 joined at step 12"),
        ({"kind": "join", "worker": None, "step": 12, "phase": None, "joined": (4, 5)}, "workers 4 and 5 joined at step 12"),
    ],
)
def test_the_headline_says_who_and_what(changes: dict[str, object], headline: str) -> None:
    assert lines(dataclasses.replace(DEATH, **changes))[0] == headline


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"attempts": 2, "phases_ms": {"commit": 1.0, "gate": 2.0}}, "+0.9 ms detected | gate 2.0 | commit 1.0 | 2 attempts"),
        ({"detected_ms": None, "phases_ms": {"quiesce": 3.0, "propose": 1.0}}, "quiesce 3.0 ms | propose 1.0"),
        (
            {"layout_before": None, "bytes_moved": 999, "bytes_minimum": 1},
            "-> [0-3]x1 [4-9]x2, 999 bytes moved (the minimum is 1 byte), 3 links kept",
        ),
        ({"layout_after": None, "bytes_moved": 0, "bytes_minimum": 0}, "nothing moved (the minimum), 3 links kept, 1 dropped, 1 made"),
        ({"layout_after": None, "bytes_moved": 3_210, "bytes_minimum": None, "links_kept": None}, "3.2 kB moved, 1 link dropped, 1 made"),
        ({"lost_ms": 20.0, "steps_redone": 2}, "running again after 61 ms; lost 20 ms of steps 7 to 8, no sample lost, stalled 243 ms"),
        ({"lost_ms": 0.0, "steps_redone": 0}, "running again after 61 ms; no step redone, no sample lost, stalled 243 ms"),
        ({"lost_ms": None, "samples_lost": 32, "running_ms": None}, "1 step redone, 32 samples lost, stalled 243 ms"),
        ({"lost_ms": None, "samples_lost": None, "steps_redone": None, "stall_ms": None}, "running again after 61 ms"),
    ],
)
def test_other_lines(changes: dict[str, object], line: str) -> None:
    assert any(found.strip().startswith(line) for found in lines(dataclasses.replace(DEATH, **changes)))


def test_only_what_is_known_is_shown() -> None:
    assert timeline(Incident(kind="death")) == "a worker died"


@pytest.mark.parametrize(("fields", "message"), [({"kind": "flood"}, "kind='flood'"), ({"kind": "join", "phases_ms": {"nap": 1.0}}, "nap")])
def test_nonsense_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Incident(**fields)  # pyright: ignore[reportArgumentType]


def test_incidents_are_kept_in_order_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "incidents.jsonl"
    assert read(path) == []
    incidents = [DEATH, Incident(kind="join", joined=(4, 5)), Incident(kind="eviction", worker=2, also=(3,), why="zwölf\nZeilen")]
    for incident in incidents:
        append_lines(path, [incident.to_json()])
    assert read(path) == incidents
    assert len(path.read_bytes().splitlines()) == 3


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "incidents.jsonl"
    append_lines(path, [DEATH.to_json()])
    whole = path.read_bytes()
    for length in {*range(0, len(whole), 50), len(whole) - 1}:
        path.write_bytes(whole + whole[:length])
        assert read(path) == [DEATH]


@pytest.mark.parametrize(
    "content", ["no json\n", '{"kind": "death", "colour": "red", "also": [], "joined": []}\n', '{"kind": "death"}\n', "[1]\n"]
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "incidents.jsonl"
    path.write_text(content)
    with pytest.raises(SettingsError, match=r"incidents\.jsonl"):
        read(path)


FINDING = Finding(
    state="exp_avg",
    layer=3,
    start=4096,
    stop=8192,
    step=5,
    good=4,
    copy="the",
    parameters=("3.a", "3.b", "3.c", "3.d"),
    digests={"owner worker 1 (host a)": "aa", "replica worker 2 (host b)": "bb"},
)


def test_a_finding_says_what_is_wrong_where_and_since_when():
    assert str(FINDING) == (
        "the exp_avg of layer 3, run [4096, 8192), as of step 5 (of 3.a, 3.b, 3.c and 1 more): aa owner worker 1 (host a), "
        "bb replica worker 2 (host b); it was right after step 4"
    )


def test_copies_that_differ_are_nobodys_fault(tmp_path: Path):
    incident = Incident(kind="damage", step=7, why=f"copies differ: {FINDING}", findings=(FINDING,), went_back_to=0)
    first, second = lines(incident)
    assert first == f"copies of the state differed in step 7: copies differ: {FINDING}"
    assert second == "  went back to the state after step 0"
    append_lines(tmp_path / "incidents", [incident.to_json()])
    assert read(tmp_path / "incidents") == [incident]
