from __future__ import annotations

import time
from pathlib import Path

import pytest

from elastic.errors import SettingsError
from elastic.observe import phase_delay


def test_it_waits_in_its_phases_and_where_they_are_of_a_step_in_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    assert phase_delay.read(tmp_path) is None
    phase_delay.write(tmp_path, ["apply", "gate"], 0.03, step=8)
    found = phase_delay.read(tmp_path)
    assert found is not None
    for phase, step in [("apply", 7), ("gather", 8), ("apply", 8), ("gate", 6)]:
        found(phase, step)
    assert slept == [0.03, 0.03]
    phase_delay.write(tmp_path, ["apply"], 0.01)
    found = phase_delay.read(tmp_path)
    assert found is not None
    found("apply", 3)
    assert slept == [0.03, 0.03, 0.01]


def test_what_it_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no phase aply: use idle, forward"):
        phase_delay.write(tmp_path, ["aply"], 0.1)
    (tmp_path / phase_delay.NAME).write_text("{}")
    with pytest.raises(SettingsError, match=r"phase-delay\.json is not what .* writes: 'phases'"):
        phase_delay.read(tmp_path)
