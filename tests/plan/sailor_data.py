"""Finds the data published with Sailor, if present."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("ELASTIC_DATA", ROOT.parent / "shared" / "data"))
SAILOR = DATA / "sailor"

needs_data = pytest.mark.skipif(not SAILOR.is_dir(), reason="the data published with Sailor is not there: set ELASTIC_DATA to its parent")
