"""Tests what an agent is refused for by its first message, in which order, and which scripts have a digest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elastic.agent.admissions import refusal, script_digest
from elastic.script.sources import file_digest
from elastic.settings import VERSION, JobSettings

SETTINGS = JobSettings(name="job", workers=1, train_fn="/here/train.py:train", isa="default")
FITS = {"version": VERSION, "isa": "default", "target": "train.py:train", "script": "a", "given": {}}


@pytest.mark.parametrize(
    ("differs", "reason"),
    [
        ({}, None),
        ({"script": None}, None),
        ({"version": "0"}, "it runs version 0 of this package, and the job version"),
        ({"target": "other.py:train", "script": "b"}, "it was started for other.py:train, and the job runs train.py:train"),
        ({"script": "b"}, "its train.py is not the file that the job began with"),
        ({"script": "b", "given": {"seed": -1}}, "its train.py is not the file"),
        ({"given": {"seed": -1}}, "it was started with seed=-1"),
    ],
)
def test_the_first_difference_is_named(differs: dict[str, Any], reason: str | None) -> None:
    found = refusal(SETTINGS, {**FITS, **differs}, "a")
    assert (found is None) if reason is None else (found or "").startswith(reason)


def test_an_agent_of_another_version_need_not_send_what_this_one_compares() -> None:
    assert "install the same" in (refusal(SETTINGS, {"version": "0"}, "a") or "")


def test_a_script_in_a_module_is_not_compared_by_its_file() -> None:
    assert refusal(SETTINGS, {**FITS, "script": "b"}, None) is None


def test_the_digest_is_that_of_the_scripts_content(tmp_path: Path) -> None:
    script = tmp_path / "train"  # without .py
    script.write_text("one")
    first = script_digest(f"{script}:train")
    assert first == file_digest(str(script)) is not None
    script.write_text("two")
    assert script_digest(f"{script}:train") not in (first, None)
    assert script_digest("package.module:train") is None
    assert script_digest(f"{tmp_path}/absent.py:train") is None
