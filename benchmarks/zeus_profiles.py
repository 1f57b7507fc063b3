"""Reads the published power sweeps of Zeus (NSDI '23): seconds of an epoch and mean watts at each power limit, on four kinds of GPUs.

`zeus_power_sweeps.csv` has the columns gpu, network, batch_size, power_limit, time_per_epoch, average_power of the rows with the largest
batch of each network and GPU, from https://github.com/ml-energy/zeus (Apache-2.0), commit 75a8b93, folder
examples/research_reproducibility/zeus_nsdi23/trace. A run of this file on a checkout of that folder writes it again.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable
from pathlib import Path

from elastic.plan.clocks import ClockChoices, ClockPoint

SWEEPS = Path(__file__).with_name("zeus_power_sweeps.csv")
GPUS = ("a40", "p100", "rtx6000", "v100")

IDLE_W = {"a40": 30.0, "p100": 30.0, "rtx6000": 25.0, "v100": 40.0}
"""Watts of an idle GPU of each kind: assumed, since the sweeps do not have it."""

Sweep = dict[int, tuple[float, float]]


def load(path: Path = SWEEPS) -> dict[tuple[str, str], Sweep]:
    """Returns seconds and watts by power limit in watts, for each GPU and network."""
    found: dict[tuple[str, str], Sweep] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(line for line in file if not line.startswith("#")):
            seconds, watts = float(row["time_per_epoch"]), float(row["average_power"])
            found.setdefault((row["gpu"], row["network"]), {})[int(row["power_limit"])] = seconds, watts
    return found


def choices_of(gpu: str, sweep: Sweep) -> ClockChoices:
    """Returns the settings of a GPU, its power limits, in the planner's form; the usual one is the highest limit."""
    top = max(sweep)
    points = tuple(ClockPoint(limit, sweep[limit][0] / sweep[top][0], sweep[limit][1]) for limit in sorted(sweep, reverse=True))
    return ClockChoices(points=points, usual=top, idle_w=IDLE_W[gpu])


def _written(trace: Path, lines: Iterable[str]) -> list[str]:
    found = list(lines)
    for gpu in GPUS:
        with (trace / f"summary_power_{gpu}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        for network in sorted({row["network"] for row in rows}):
            ours = [row for row in rows if row["network"] == network]
            batch = max(int(row["batch_size"]) for row in ours)
            first = next(row for row in ours if int(row["batch_size"]) == batch)
            for row in ours:
                if int(row["batch_size"]) == batch and (row["dataset"], row["optimizer"]) == (first["dataset"], first["optimizer"]):
                    seconds, watts = float(row["time_per_epoch"]), float(row["average_power"])
                    found.append(f"{gpu},{network},{batch},{row['power_limit']},{seconds:.6g},{watts:.6g}")
    return found


if __name__ == "__main__":
    header = [
        "# Zeus power traces, https://github.com/ml-energy/zeus, Apache-2.0, commit 75a8b93; see benchmarks/zeus_profiles.py",
        "gpu,network,batch_size,power_limit,time_per_epoch,average_power",
    ]
    SWEEPS.write_text("\n".join(_written(Path(sys.argv[1]), header)) + "\n")
