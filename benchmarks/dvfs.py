"""Measures clocks on stand-in GPUs, and the frontier on published power sweeps: python benchmarks/dvfs.py --json build/dvfs.json

    speed      four stages, one slow: what share of the step time that the model says can be recovered is recovered
    energy     the same, to save energy: joules saved by the energy counters, and how much slower steps are
    frontier   energy of the frontier's points over the least energy of all combinations of clocks, on Zeus's power sweeps; with `lowtime`
               installed also its frontier, in which every computation may have a clock of its own
    kills      agent, guardian or both are killed at random moments: how long after the guardian's end or its successor's start all clocks
               are restored
    polling    seconds of reading the energy counter, as a share of a step
    digest     parameters with and without clocks

The GPUs are stand-ins: what is measured is the runtime, not any GPU. Times of a loaded machine mean little; the load is in the output.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import elastic  # noqa: E402
from benchmarks.zeus_profiles import GPUS, choices_of, load  # noqa: E402
from elastic.plan.clock_search import ClockSearch  # noqa: E402
from elastic.plan.clocks import JobSteps, Mode  # noqa: E402
from elastic.plan.fleet import Fleet  # noqa: E402
from elastic.plan.plan import Stage  # noqa: E402
from elastic.plan.workload import LayerCost, Workload  # noqa: E402
from elastic.power.clocks import Clocks  # noqa: E402
from elastic.power.nvml import Nvml  # noqa: E402
from examples.dvfs_training import train  # noqa: E402
from examples.nvml_standin import GpuKind, StandIn, build  # noqa: E402

NETWORKS = ("bert_base_uncased", "deepspeech2", "resnet50", "shufflenetv2")
SECONDS = (0.10, 0.16, 0.13, 0.09)
"""The stages of the pipeline of published networks: seconds of a micro-batch, forward and backward, at the highest power limit."""


def trained(mode: Mode | str, base: Path, *, slow: float, seconds: float, steps: int, beta: float = 0.9) -> tuple[Any, dict[str, Any]]:
    """Trains eight layers in four stages on GPUs of which the last one is `slow` times as slow. Returns the value and energy figures."""
    directory = base / f"{mode}-{seconds}"
    (directory / "claims").mkdir(parents=True)
    standin = StandIn.made(base / "gpus", [*[GpuKind()] * 3, GpuKind(slower=slow)])
    options = {"uuids": standin.uuids, "directory": str(directory / "claims"), "layers": 8, "width": 16, "seconds": seconds, "beta": beta}
    result = elastic.run(
        train,
        workers=4,
        stages=4,
        args=[{**options, "steps": steps, "micro_batches": 32}],
        dvfs=mode,  # pyright: ignore[reportArgumentType]
        directory=directory / "run",
        rebalance=False,
        plan=None,
    )
    return result.value, json.loads((directory / "run" / "energy.json").read_text())


def closed_loop(mode: Mode, base: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures a mode against the usual clocks of the same job."""
    value, found = trained(mode, base, slow=arguments.slow, seconds=arguments.seconds, steps=arguments.steps, beta=arguments.beta)
    usual, now, predicted = found["usual"], found["now"], found["predicted"]
    can = 1 - min(each["step_s"] for each in found["frontier"]) / predicted["usual"]["step_s"]
    return {
        "state": found["state"],
        "slow": arguments.slow,
        "beta": arguments.beta,
        "value": value,
        "usual": usual,
        "now": now,
        "predicted": predicted,
        "faster": 1 - now["step_s"] / usual["step_s"],
        "could_be_faster": can,
        "recovered": (1 - now["step_s"] / usual["step_s"]) / can,
        "joules_saved": 1 - now["joules"] / usual["joules"],
        "slower": now["step_s"] / usual["step_s"] - 1,
        "models": sorted(found["models"].values()),
        "clocks": [stage["clocks_mhz"] for stage in found["stages"]],
    }


def pipeline(seconds: tuple[float, ...], micro_batches: int) -> JobSteps:
    """Returns the steps of a pipeline with one GPU a stage."""
    layers = tuple(LayerCost(forward_s=each / 3, backward_s=2 * each / 3, parameters=64, activation_bytes=0) for each in seconds)
    workload = Workload(layers=layers, micro_batches=micro_batches, grains=micro_batches)
    stages = [Stage(layers=range(number, number + 1), members=(number,)) for number in range(len(seconds))]
    routes = [(stage.members[0],) * micro_batches for stage in stages]
    return JobSteps(workload, Fleet(workers=tuple(range(len(seconds)))), stages, routes)


def frontier(gpu: str) -> dict[str, Any]:
    """Compares the frontier of one kind of GPU with all combinations of its power limits: four stages, one published network each."""
    sweeps = load()
    choices = [choices_of(gpu, sweeps[gpu, network]) for network in NETWORKS]
    search = ClockSearch(pipeline(SECONDS, 8), choices)
    began = time.perf_counter()
    points = search.frontier()
    took_s = time.perf_counter() - began
    every = [search.clocked(each) for each in itertools.product(*search.options())]
    over = [point.joules / min(each.joules for each in every if each.step_s <= point.step_s * (1 + 1e-9)) for point in points]
    found = [search.within(point.step_s * (1 + 1e-9)) for point in points]  # the search that is used where combinations are too many
    searched = [each.joules / point.joules for each, point in zip(found, points, strict=True) if each is not None]
    return {
        "gpu": gpu,
        "points": len(points),
        "combinations": len(every),
        "worst": max(over) - 1,
        "worst_of_search": max(searched) - 1,
        "median_of_search": sorted(searched)[len(searched) // 2] - 1,
        "seconds": took_s,
    }


class Subject:
    """A process that sets clocks as an agent does, with its guardian."""

    def __init__(self, clocks: dict[str, int]) -> None:
        words = [sys.executable, "-m", "tests.power.agent", "benchmark", *(f"{uuid}={mhz}" for uuid, mhz in clocks.items())]
        self.process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.guardian = json.loads(self.process.stdout.readline())["guardian"]


def kills(standin: StandIn, directory: Path, count: int, seed: int) -> dict[str, Any]:
    """Kills the agent, the guardian or both, `count` times. Returns the seconds until the clocks were restored."""
    chance, seconds, kinds = random.Random(seed), list[float](), dict[str, int]()
    for _ in range(count):
        os.environ["ELASTIC_CLOCKS"] = str(directory)
        subject = Subject({uuid: chance.choice((900, 1080, 1215)) for uuid in chance.sample(standin.uuids, chance.randint(1, 4))})
        assert any(standin.locked)
        kind = chance.choice(("agent", "guardian", "both"))
        kinds[kind] = kinds.get(kind, 0) + 1
        time.sleep(chance.random() * 0.05)
        if kind != "guardian":
            os.kill(subject.process.pid, signal.SIGKILL)
        if kind != "agent":
            os.kill(subject.guardian, signal.SIGKILL)
        successor = None
        began = time.monotonic()
        if kind != "agent":  # the agent, or the next job, starts a successor, which says when it is ready
            successor = Clocks("successor", directory, directory / "no-daemon")
            began = time.monotonic()
        restored = _waited(lambda: not any(standin.locked), 10.0)
        seconds.append(time.monotonic() - began if restored else float("inf"))
        subject.process.kill()
        subject.process.communicate()
        if successor is not None:
            successor.close()
    return {"kills": count, "kinds": kinds, "restored": sum(each < 1.0 for each in seconds), "most_s": max(seconds)}


def _waited(until: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not until():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return True


def polling(standin: StandIn) -> dict[str, float]:
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
    parser = argparse.ArgumentParser(description="Clocks on stand-in GPUs, and the frontier on published sweeps.")
    parser.add_argument("--parts", nargs="*", default=["speed", "energy", "frontier", "kills", "polling", "digest"])
    parser.add_argument("--slow", type=float, default=1.6)
    parser.add_argument("--beta", type=float, default=0.9, help="share of the work that depends on the clock")
    parser.add_argument("--seconds", type=float, default=0.002)
    parser.add_argument("--steps", type=int, default=70)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "processors": os.cpu_count(), "gpus": "stand-in"}
    with tempfile.TemporaryDirectory(prefix="elastic-dvfs-") as name:
        base = Path(name)
        library = build(base)
        standin = StandIn.made(base / "gpus", [GpuKind()] * 4)
        environment = standin.environment(library)
        if os.environ.get("NVML_STANDIN") is None:  # the loader reads its path when a process starts
            found = json.loads(_again(environment, base))
        else:
            for part in arguments.parts:
                found[part] = _part(part, base, standin, arguments)
            found["load"] = os.getloadavg()[0]
    text = json.dumps(found, indent=1)
    if arguments.json is not None and os.environ.get("NVML_STANDIN") is None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text + "\n")
    print(text)


def _again(environment: dict[str, str], base: Path) -> str:
    words = [sys.executable, *sys.argv]
    settings = {**os.environ, **environment, "ELASTIC_CLOCKS": str(base / "clocks"), "ELASTIC_POWER_SOCKET": str(base / "no-daemon")}
    return subprocess.run(words, env=settings, stdout=subprocess.PIPE, text=True, check=True).stdout


def _part(part: str, base: Path, standin: StandIn, arguments: argparse.Namespace) -> Any:
    os.environ["NVML_STANDIN"] = str(base / "gpus")
    if part in ("speed", "energy"):
        return closed_loop("speed" if part == "speed" else "energy", base, arguments)
    if part == "frontier":
        return [frontier(gpu) for gpu in GPUS]
    if part == "kills":
        return kills(standin, base / "kill-clocks", arguments.kills, 1)
    if part == "polling":
        return polling(standin)
    return trained("off", base, slow=1.0, seconds=0.0, steps=arguments.steps)[0]


if __name__ == "__main__":
    main()
