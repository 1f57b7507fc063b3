"""Runs a job whose stderr accepts nothing, in its own process: `blind.py FOLDER STEPS` writes `FOLDER/result.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import elastic
from tests.recovery import trainings

if __name__ == "__main__":
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    dies = {"0": ["deletes", 4], "1": ["backward", 6, 2]}
    case = next(iter(trainings.CASES))
    result = elastic.run(
        trainings.train, args=[str(folder), case, steps, dies, 0.04], directory=folder / "run", workers=3, stages=2, rebalance=False
    )
    (folder / "result.json").write_text(json.dumps([result.value, [incident["kind"] for incident in result.incidents]]))
