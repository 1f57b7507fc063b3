"""Fixtures of tests that lose workers."""

from __future__ import annotations

import pytest

from elastic.settings import SEGMENTS


@pytest.fixture
def without_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """State is lost with its worker's process, and workers keep replicas of each other's, as hosts do."""
    monkeypatch.setenv(SEGMENTS, "0")
