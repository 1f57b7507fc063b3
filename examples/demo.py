"""Trains the GPT example twice, on four workers in two stages and on one worker, and compares the parameters bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS = 10


def train(folder: Path, workers: int, stages: int) -> str:
    """The digest of all parameters after training."""
    report = folder / f"{workers}x{stages}.json"
    example = Path(__file__).with_name("gpt.py")
    print(f"\n== {workers} worker{'s' * (workers > 1)}, {stages} stage{'s' * (stages > 1)}", flush=True)
    command = [sys.executable, str(example), "--workers", str(workers), "--stages", str(stages), "--steps", str(STEPS)]
    subprocess.run([*command, "--dropout", "0.1", "--report", str(report)], check=True)
    return json.loads(report.read_text())["digest"]


def main() -> int:
    """0 if the digests are equal."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            many, one = train(Path(folder), 4, 2), train(Path(folder), 1, 1)
        except subprocess.CalledProcessError as error:
            return error.returncode
    equal = many == one
    print(f"\ndigests {'EQUAL: the parameters are bit for bit the same on both layouts' if equal else f'DIFFER: {many} and {one}'}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
