"""The planner on data published by others; each of these prints one JSON object:

    python benchmarks/planner.py --data DIR --sailor --model OPT-350 --gpus A100-40=32,V100-16=96 [--gbs N] [--mbs N] [--export-sailor FILE]
    python benchmarks/planner.py --data DIR --accuracy RUN.json ...
    python benchmarks/planner.py --dtfm FILE
    python benchmarks/planner.py --replan WORKERS

1. The plan with the least step time under the reference cost rules of Sailor's data, for any model, device kinds and counts in it:
   `{"step_s", "search_s", "plan"}`. The exported file is in the form of the measured runs, so that others can score it.
2. Step time and peak memory of measured runs, predicted by a model with nothing fitted to them, against what was measured:
   `{"time_error_mean", "time_error_max", "memory_error_mean", "runs"}`, errors relative to the measured value.
3. The placement of the devices of a DT-FM network: `{"cost_s", "search_s", "groups"}`.
4. The loss of one of so many workers, for which a plan was prepared: `{"replan_s", ...}`.

`search_s` is the median of `--repeat` searches, with the data loaded.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from planner_accuracy import accuracy
from planner_dtfm import place
from planner_replan import replan
from planner_sailor import SailorRequest, counts, search

from elastic.errors import PlanError


def _arguments() -> argparse.ArgumentParser:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = ask.add_mutually_exclusive_group(required=True)
    what.add_argument("--sailor", action="store_true", help="plan for --model on --gpus")
    what.add_argument("--accuracy", nargs="+", type=Path, metavar="RUN", help="predict these measured runs of --model")
    what.add_argument("--dtfm", type=Path, metavar="FILE", help="place the devices of this network")
    what.add_argument("--replan", type=int, metavar="WORKERS", help="lose one of so many workers")
    ask.add_argument("--data", type=Path, help="the folder of Sailor's data, or the one above it")
    ask.add_argument("--model", default="OPT-350")
    ask.add_argument("--gpus", help="such as A100-40=32,V100-16=96")
    ask.add_argument("--gbs", type=int, help="samples a step; by default as in the model's training configuration")
    ask.add_argument("--mbs", type=int, help="samples per micro-batch; by default any that was profiled")
    ask.add_argument("--mixed", action="store_true", help="also look for stages of two device kinds: better for odd counts, slower")
    ask.add_argument("--repeat", type=int, default=5, help="searches, of which the median time is told")
    ask.add_argument("--export-sailor", type=Path, metavar="FILE", help="write the plan in the form of the measured runs")
    return ask


def run(words: list[str]) -> dict[str, Any]:
    """What the arguments ask for. Raises PlanError for data or a request that cannot be planned."""
    ask = _arguments()
    told = ask.parse_args(words)
    if told.repeat < 1:
        ask.error("--repeat must be at least 1")
    if told.dtfm:
        return place(told.dtfm, told.repeat)
    if told.replan is not None:
        if told.replan < 2:
            ask.error("--replan needs at least 2 workers")
        return replan(told.replan, told.repeat)
    if told.data is None:
        ask.error("--data is needed: the folder of Sailor's data")
    data = told.data / "sailor" if (told.data / "sailor").is_dir() else told.data
    if told.accuracy:
        return accuracy(data, told.model, told.accuracy)
    if not told.gpus:
        ask.error("--gpus is needed, such as A100-40=32,V100-16=96")
    request = SailorRequest(model=told.model, gpus=counts(told.gpus), batch=told.gbs, size=told.mbs, mixed=told.mixed, repeat=told.repeat)
    return search(data, request, told.export_sailor)


def main() -> int:
    try:
        print(json.dumps(run(sys.argv[1:])))
    except PlanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
