"""Trains the GPT example undisturbed, then again with a worker killed in the middle of a step, and compares the parameters bit for bit.

Options are passed on to gpt.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS = 14


def train(folder: Path, title: str, *options: str) -> dict[str, Any]:
    """Runs the example and returns its report."""
    report = folder / "report.json"
    example = Path(__file__).with_name("gpt.py")
    print(f"\n== {title}", flush=True)
    command = [sys.executable, str(example), "--workers", "4", "--stages", "2", "--steps", str(STEPS), "--dropout", "0.1", *sys.argv[1:]]
    subprocess.run([*command, *options, "--report", str(report)], check=True)
    return json.loads(report.read_text())


def main() -> int:
    """Returns 0 if a worker was killed and replaced, and parameters and losses are still equal."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            calm = train(Path(folder), "4 workers in 2 stages")
            killed = train(Path(folder), "the same, and the worker at place 1 gets SIGKILL in step 4, backward", "--kill", "1@4:backward")
        except subprocess.CalledProcessError as error:
            return error.returncode
    kinds = [incident["kind"] for incident in killed["incidents"]]
    if kinds != ["death", "join"]:
        print(f"\nexpected the incidents death and join, found: {', '.join(kinds) or 'none'}")
        return 1
    equal = (calm["digest"], calm["losses"]) == (killed["digest"], killed["losses"])
    verdict = "EQUAL: parameters and losses are bit for bit those of the undisturbed run" if equal else "DIFFER"
    print(f"\ndigests {verdict}\n  undisturbed {calm['digest']}\n  killed      {killed['digest']}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
