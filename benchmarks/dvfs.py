"""Measures clocks on stand-in GPUs, and the frontier on published power sweeps: python benchmarks/dvfs.py --json build/dvfs.json

    speed      four stages, one slow, on GPUs that an operator holds at 1095 MHz: what share of the step time that the model says can be
               recovered is recovered
    energy     the same on GPUs that run at their highest clock: joules saved by the energy counters, and how much slower steps are; the
               chosen and the usual clocks in turns (`dvfs_turns.py`)
    optimum    no clocks save more: the least energy of all combinations of the measured clocks, by slowness, micro-batches and slow-down
    frontier   energy of the frontier's points over the least energy of all combinations of clocks, on Zeus's power sweeps: with all
               combinations, and with the search for more of them
    kills      see dvfs_kills.py
    reading    seconds of one reading of energy and throttling; the jobs have the share of the time that reading takes, as processor time
               and with the reading thread's waits
    digest     whether parameters with "speed", with "energy" and without clocks are equal, bit for bit

The GPUs are stand-ins with the measured time and power of an A100 at each clock (`A100` in examples/nvml_standin.py): what is measured is
the runtime, not any GPU. Times of a loaded machine mean little; the load is in the output.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import elastic  # noqa: E402
from benchmarks import dvfs_kills  # noqa: E402
from benchmarks.dvfs_turns import Turns  # noqa: E402
from benchmarks.zeus_profiles import GPUS, choices_of, load  # noqa: E402
from elastic.plan.clock_search import ClockSearch  # noqa: E402
from elastic.plan.clocks import ClockChoices, Clocked, ClockPoint, JobSteps, Mode  # noqa: E402
from elastic.plan.fleet import Fleet  # noqa: E402
from elastic.plan.plan import Plan, Stage  # noqa: E402
from elastic.plan.workload import LayerCost, Workload  # noqa: E402
from elastic.power.nvml import Nvml  # noqa: E402
from examples.dvfs_training import train  # noqa: E402
from examples.nvml_standin import A100, StandIn, build  # noqa: E402

NETWORKS = ("bert_base_uncased", "deepspeech2", "resnet50", "shufflenetv2")
SECONDS = (0.10, 0.16, 0.13, 0.09)
"""The stages of the pipeline of published networks: seconds of a micro-batch, forward and backward, at the highest power limit."""


CAPPED_MHZ = 1095
"""The clock of GPUs in "speed", of which the highest is 1410 MHz."""


def trained(
    mode: Mode | str, base: Path, arguments: argparse.Namespace, *, seconds: float, steps: int
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Trains eight layers in four stages on GPUs of which the last one is slow.

    Returns the value, the energy figures, and what `Turns` found.
    """
    directory = base / f"{mode}-{seconds}-{steps}"
    (directory / "claims").mkdir(parents=True)
    kind = replace(A100, application_mhz=CAPPED_MHZ) if mode == "speed" else A100
    standin = StandIn.made(base / "gpus", [*[kind] * 3, replace(kind, slower=arguments.slow)])
    options = {"uuids": standin.uuids, "directory": str(directory / "claims"), "layers": 8, "width": 16, "seconds": seconds, "beta": 1.0}
    turns = Turns(standin.uuids, directory / "run", directory / "claims" / "steps.jsonl", rounds=arguments.rounds, each=arguments.each)
    with turns if seconds else nullcontext():
        result = elastic.run(
            train,
            workers=4,
            stages=4,
            args=[{**options, "steps": steps, "micro_batches": arguments.micro_batches}],
            dvfs=mode,  # pyright: ignore[reportArgumentType]
            directory=directory / "run",
            rebalance=False,
        )
    return result.value, turns.energy, turns.found() | {"trained": len((directory / "claims" / "steps.jsonl").read_text().splitlines())}


def closed_loop(mode: Mode, base: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures a mode against the usual clocks of the same job."""
    value, found, turns = trained(mode, base, arguments, seconds=arguments.seconds, steps=arguments.steps)
    usual, now, predicted = found["usual"], found["now"], found["predicted"]
    can = 1 - min(each["step_s"] for each in found["frontier"]) / predicted["usual"]["step_s"]
    return {
        "state": found["state"],
        "slow": arguments.slow,
        "micro_batches": arguments.micro_batches,
        "value": value,
        "usual": usual,
        "now": now,
        "predicted": predicted,
        "turns": turns,
        "could_be_faster": can,
        "recovered": -turns["slower"] / can if can > 0.01 else None,  # at their highest clocks GPUs have nothing to give
        "joules_saved": turns["joules_saved"],
        "slower": turns["slower"],
        "models": sorted(found["models"].values()),
        "clocks": [stage["clocks_mhz"] for stage in found["stages"]],
        "reading_share": found["reading"]["cpu_s"] / found["reading"]["of_s"],
        "reading_share_with_waits": found["reading"]["seconds"] / found["reading"]["of_s"],
    }


def parts(seconds: tuple[float, ...], micro_batches: int) -> tuple[Workload, list[Stage], list[tuple[int, ...]]]:
    """Returns workload, stages and routes of a pipeline with one GPU a stage."""
    layers = tuple(LayerCost(forward_s=each / 3, backward_s=2 * each / 3, parameters=64, activation_bytes=0) for each in seconds)
    workload = Workload(layers=layers, micro_batches=micro_batches, grains=micro_batches)
    stages = [Stage(layers=range(number, number + 1), members=(number,)) for number in range(len(seconds))]
    routes = [(stage.members[0],) * micro_batches for stage in stages]
    return workload, stages, routes


def pipeline(seconds: tuple[float, ...], micro_batches: int) -> JobSteps:
    """Returns the steps of a pipeline with one GPU a stage."""
    workload, stages, routes = parts(seconds, micro_batches)
    found = Plan(stages=tuple(stages), routes=tuple(routes), step_s=0.0, why="")
    return JobSteps(workload, Fleet(workers=tuple(range(len(seconds)))), found)


def a100() -> ClockChoices:
    """Returns the clocks of the stand-in GPUs."""
    points = tuple(ClockPoint(*point) for point in A100.sweep)
    return ClockChoices(points=points, usual=points[0].mhz, idle_w=A100.idle_w)


def optimum() -> list[dict[str, Any]]:
    """Returns the least energy of all combinations of clocks, for one slow stage of four."""
    found = []
    for slow in (1.25, 1.4, 1.6, 1.8):
        for micro_batches in (32, 64, 128, 256):
            search = ClockSearch(pipeline((0.1, 0.1, 0.1, 0.1 * slow), micro_batches), [a100()] * 4)
            search._search(search.options()).most_work = 10**9
            usual = search.usual
            for slack in (0.0, 0.005, 0.0075, 0.01):
                best = search.within(usual.step_s * (1 + slack))
                assert best is not None
                saved = 1 - best.joules / usual.joules
                found.append({"slow": slow, "micro_batches": micro_batches, "slack": slack, "saved": saved, "clocks": best.clocks})
    return found


def frontier(gpu: str, stages: int = 4) -> dict[str, Any]:
    """Compares the frontier of one kind of GPU with all combinations of its power limits: a published network on each stage."""
    sweeps, seconds = load(), (SECONDS * 2)[:stages]
    choices = [choices_of(gpu, sweeps[gpu, (NETWORKS * 2)[stage]]) for stage in range(stages)]
    every, search = (ClockSearch(pipeline(seconds, 8), choices) for _ in range(2))
    every._search(every.options()).most_work = 10**10
    search._search(search.options()).most_work = 0
    combinations, steps_s, joules = every._search(every.options()).everything()
    began = time.perf_counter()
    points: tuple[Clocked, ...] = search.frontier()
    took_s = time.perf_counter() - began

    def above(found: Clocked) -> float:
        return found.joules / float(joules[steps_s <= found.step_s * (1 + 1e-9)].min()) - 1

    return {
        "gpu": gpu,
        "stages": stages,
        "combinations": len(combinations),
        "worst_of_all": max(above(each) for each in every.frontier()),
        "worst_of_search": max(above(each) for each in points),
        "points": len(points),
        "seconds_of_search": took_s,
    }


def reading(standin: StandIn) -> dict[str, float]:
    """Returns the seconds of one reading of energy and throttling, as the agent does it for each report of a worker."""
    nvml = Nvml()
    gpu = nvml.gpu(standin.uuids[0])
    seconds = []
    for _ in range(2000):
        began = time.perf_counter()
        gpu.energy_mj()
        gpu.reasons()
        seconds.append(time.perf_counter() - began)
    nvml.close()
    median = sorted(seconds)[len(seconds) // 2]
    return {"median_s": median, "share_of_a_second": 4 * 4 * median}  # four workers report four times a second


def main() -> None:
    """Runs the parts, and writes or prints JSON."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # `Turns` stops a job with it, and after `&` it would be ignored
    parser = argparse.ArgumentParser(description="Clocks on stand-in GPUs, and the frontier on published sweeps.")
    parser.add_argument("--parts", nargs="*", default=["speed", "energy", "optimum", "frontier", "kills", "reading", "digest"])
    parser.add_argument("--slow", type=float, default=1.25)
    parser.add_argument("--micro-batches", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=0.0015)
    parser.add_argument("--steps", type=int, default=400, help="at most; the job is stopped when the turns are over")
    parser.add_argument("--rounds", type=int, default=5, help="of turns with the usual and the chosen clocks")
    parser.add_argument("--each", type=int, default=4, help="steps of a turn")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "processors": os.cpu_count(), "gpus": "stand-in"}
    with tempfile.TemporaryDirectory(prefix="elastic-dvfs-") as name:
        base = Path(name)
        library = build(base)
        environment = StandIn.made(base / "gpus", [A100] * 4).environment(library)
        if os.environ.get("NVML_STANDIN") is None:  # the loader reads its path when a process starts
            found = json.loads(_again(environment, base))
        else:
            for part in arguments.parts:
                found[part] = _part(part, base, arguments, found) | {"load": os.getloadavg()[0]}
    text = json.dumps(found, indent=1)
    if arguments.json is not None and os.environ.get("NVML_STANDIN") is None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text + "\n")
    print(text)


def _again(environment: dict[str, str], base: Path) -> str:
    words = [sys.executable, *sys.argv]
    settings = {**os.environ, **environment, "ELASTIC_CLOCKS": str(base / "clocks"), "ELASTIC_POWER_SOCKET": str(base / "no-daemon")}
    return subprocess.run(words, env=settings, stdout=subprocess.PIPE, text=True, check=True).stdout


def _part(part: str, base: Path, arguments: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    os.environ["NVML_STANDIN"] = str(base / "gpus")
    if part in ("speed", "energy"):
        return closed_loop("speed" if part == "speed" else "energy", base, arguments)
    if part == "optimum":
        return {"all_combinations": optimum()}
    if part == "frontier":
        return {"gpus": [frontier(gpu, stages) for gpu in GPUS for stages in (4, 7)]}
    if part == "kills":
        return dvfs_kills.killed(arguments.kills, 1, base / "kills")
    if part == "reading":
        return reading(StandIn.made(base / "gpus", [A100] * 4))
    steps = {mode: found[mode]["turns"]["trained"] for mode in ("speed", "energy") if mode in found}
    plain = {count: trained("off", base, arguments, seconds=0.0, steps=count)[0] for count in {*steps.values()}}  # no bit depends on time
    return {"value": plain, "equal": {mode: found[mode]["value"] == plain[count] for mode, count in steps.items()}}


if __name__ == "__main__":
    main()
