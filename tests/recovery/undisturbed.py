"""Computes the results of undisturbed jobs: `undisturbed.py FOLDER` runs each case on one worker, without an agent.

It must be started in a worker's environment, which affects bits. Arguments and results are JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.engine import harness
from tests.recovery import trainings

if __name__ == "__main__":
    found = {}
    for name, steps in json.loads(sys.argv[2]).items():
        folder = Path(sys.argv[1], name)
        folder.mkdir()
        (result,) = harness.run(trainings.train, workers=1, args=(str(folder), name, steps))
        lines = (folder / "steps-0.jsonl").read_text().splitlines()
        found[name] = {"digest": result["digest"], "lines": [json.loads(line) for line in lines]}
    print(json.dumps(found))
