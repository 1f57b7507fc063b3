"""Runs Python code on the fake device in a process of its own, since a process that imports the device has it for good.

This module does not import it: forks of a process that has it cannot go backward.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python(code: str, *arguments: str, timeout_s: float = 230.0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in the root of the checkout."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)
