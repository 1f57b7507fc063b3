"""Runs an example with workers killed: `killed_example.py NAME FOLDER FAULT ...` prints digest, incidents, and faults that did not fire."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import elastic
from elastic.chaos.faults import parse
from elastic.chaos.killer import Killer

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
if __name__ == "__main__":
    name, folder, *faults = sys.argv[1:]
    main = importlib.import_module(name).main
    with Killer(folder, map(parse, faults)) as killer:
        result = elastic.run(main, workers=3, directory=folder)
    kinds = [incident["kind"] for incident in result.incidents]
    print(json.dumps({"digest": result.value, "kinds": kinds, "missed": len(killer.missed)}))
