"""Runs the planner on published data; each of these prints one JSON object:

    python benchmarks/planner.py --data DIR --sailor --model OPT-350 --gpus A100-40=32,V100-16=96 [--gbs N] [--mbs N] [--export-sailor FILE]
    python benchmarks/planner.py --data DIR --accuracy RUN.json ...
    python benchmarks/planner.py --dtfm FILE
    python benchmarks/planner.py --replan WORKERS

1. The plan with the least step time under the reference cost rules of Sailor's data, for any of its models, device kinds and counts:
   `{"step_s", "search_s", "plan"}`. The exported file has the form of the measured runs, so that others can score it.
2. Step time and peak memory of measured runs, predicted by a model with nothing fitted to them, compared with the measurements:
   `{"time_error_mean", "time_error_max", "memory_error_mean", "runs"}`, errors relative to the measured value.
3. The placement of the devices of a DT-FM network: `{"cost_s", "search_s", "groups"}`.
4. A new plan after the loss of one of `WORKERS` workers, for which a plan was prepared: `{"replan_s", ...}`.

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
    what.add_argument("--replan", type=int, metavar="WORKERS", help="lose one of WORKERS workers")
    ask.add_argument("--data", type=Path, help="the folder of Sailor's data, or the one above it")
    ask.add_argument("--model", default="OPT-350")
    ask.add_argument("--gpus", help="such as A100-40=32,V100-16=96")
    ask.add_argument("--gbs", type=int, help="samples per step; default: the model's training configuration")
    ask.add_argument("--mbs", type=int, help="samples per micro-batch; default: any size that was profiled")
    ask.add_argument("--mixed", action="store_true", help="also search stages of two device kinds: better for odd counts, slower")
    ask.add_argument("--repeat", type=int, default=5, help="number of searches; their median time is printed")
    ask.add_argument("--export-sailor", type=Path, metavar="FILE", help="write the plan in the form of the measured runs")
    return ask


def run(words: list[str]) -> dict[str, Any]:
    """Returns the result for the command-line words. Raises PlanError for data or a request that cannot be planned."""
    ask = _arguments()
    chosen = ask.parse_args(words)
    if chosen.repeat < 1:
        ask.error("--repeat must be at least 1")
    if chosen.dtfm:
        return place(chosen.dtfm, chosen.repeat)
    if chosen.replan is not None:
        if chosen.replan < 2:
            ask.error("--replan needs at least 2 workers")
        return replan(chosen.replan, chosen.repeat)
    if chosen.data is None:
        ask.error("--data is needed: the folder of Sailor's data")
    data = chosen.data / "sailor" if (chosen.data / "sailor").is_dir() else chosen.data
    if chosen.accuracy:
        return accuracy(data, chosen.model, chosen.accuracy)
    if not chosen.gpus:
        ask.error("--gpus is needed, such as A100-40=32,V100-16=96")
    gpus = counts(chosen.gpus)
    request = SailorRequest(model=chosen.model, gpus=gpus, batch=chosen.gbs, size=chosen.mbs, mixed=chosen.mixed, repeat=chosen.repeat)
    return search(data, request, chosen.export_sailor)


def main() -> int:
    try:
        print(json.dumps(run(sys.argv[1:])))
    except PlanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
