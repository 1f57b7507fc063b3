"""Clocks that follow the imbalance of stages, in one command: python examples/dvfs.py [--mode energy] [--svg dvfs.svg]

Four workers train nine layers in four stages, so one stage has three layers and the others wait for it. The runtime measures the GPUs at a
few clocks, fits a model, sets one clock a stage, and measures again. Then a worker is killed; the clocks come with the next plan. At the
end all clocks are as they were found, and with --compare the parameters are compared with those of a run without clocks, bit for bit.

The runtime computes on processors, so the GPUs are stand-ins (`nvml_standin.c`), whose clocks determine how long layers take and how many
watts: as measured on an A100. In the mode "speed" they are held at 1095 MHz of 1410, so that there is something to raise. GPUs of this
machine are read and shown; nothing is set on them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from dvfs_picture import Sample, picture
from dvfs_training import train
from nvml_standin import A100, StandIn, build

import elastic
from elastic.errors import PowerError
from elastic.plan.clocks import Mode
from elastic.power.nvml import Nvml


def show_real_gpus() -> None:
    """Prints what NVML reads from this machine's GPUs."""
    try:
        nvml = Nvml()
    except PowerError as error:
        print(f"this machine has no GPU to read ({error.condition}): stand-in GPUs are used")
        return
    for uuid in nvml.uuids():
        gpu = nvml.gpu(uuid)
        print(f"{uuid} {gpu.name()}: {gpu.clock_mhz()} MHz, {gpu.power_w():.1f} W; read only, nothing is set on it")
    nvml.close()
    print("the runtime computes on processors: the training uses stand-in GPUs")


CAPPED_MHZ = 1095


class Watcher:
    """Samples the stand-in GPUs while a job runs, and kills a worker once clocks have been set and measured for a while."""

    def __init__(self, standin: StandIn, directory: Path, *, kills: bool) -> None:
        self._standin, self._directory, self._kills = standin, directory, kills
        self.samples: list[Sample] = []
        self.killed_at: float | None = None
        self.before_kill: dict[str, Any] = {}  # the energy figures of the first view: later ones have nothing to be compared with
        self._held_since: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(0.05):
            now = time.monotonic()
            joules = sum(gpu.energy_j + gpu.idle_w * max(0.0, now - gpu.accrued_at) for gpu in self._standin.gpus)
            self.samples.append(Sample(now, tuple(self._standin.locked), joules))
            if self._kills and self.killed_at is None:
                self._maybe_kill(now)

    def _maybe_kill(self, now: float) -> None:
        told = energy_of(self._directory)
        if told.get("state") not in ("held", "undone"):
            return
        self._held_since = self._held_since or now
        if now - self._held_since > 2.0:
            member = json.loads((self._directory / "members.json").read_text())["members"][-1]
            os.kill(member["pid"], signal.SIGKILL)
            self.killed_at, self.before_kill = now, told


def energy_of(directory: Path) -> dict[str, Any]:
    """Returns what the job has written about its energy; empty if it has written nothing yet."""
    try:
        return json.loads((directory / "energy.json").read_text())
    except (OSError, ValueError):
        return {}


def trained(mode: Mode, standin: StandIn, base: Path, arguments: argparse.Namespace, *, kills: bool) -> tuple[Any, Watcher, dict[str, Any]]:
    """Runs the training in a mode. Returns its value, what was seen, and the energy figures."""
    directory = base / mode
    (directory / "claims").mkdir(parents=True)
    options = {
        "uuids": standin.uuids,
        "directory": str(directory / "claims"),
        "layers": arguments.layers,
        "width": 16,
        "seconds": arguments.seconds,
        "beta": 1.0,
        "steps": arguments.steps,
        "micro_batches": arguments.micro_batches,
    }
    print(f"it trains; meanwhile: elastic energy {directory / 'run'} --svg frontier.svg", flush=True)
    with Watcher(standin, directory / "run", kills=kills) as watcher:
        result = elastic.run(
            train,
            workers=4,
            stages=4,
            args=[options],
            dvfs=mode,
            directory=directory / "run",
            rebalance=False,
            name=f"dvfs-{mode}",
            progress=False,
        )
    return result.value, watcher, watcher.before_kill or energy_of(directory / "run")


def steps_of(base: Path, mode: str) -> list[dict[str, Any]]:
    """Returns the lines of the steps: when each was handed out."""
    return [json.loads(line) for line in (base / mode / "claims" / "steps.jsonl").read_text().splitlines()]


def main() -> None:
    """Runs the closed loop."""
    parser = argparse.ArgumentParser(description="Clocks that follow the imbalance of stages, on stand-in GPUs.")
    parser.add_argument("--mode", choices=("speed", "energy"), default="energy")
    parser.add_argument("--steps", type=int, default=110)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--micro-batches", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=0.001, help="of a layer's forward for a micro-batch at the highest clock")
    parser.add_argument("--svg", type=Path, help="draw clocks, seconds and watts over time")
    parser.add_argument("--json", type=Path, help="write the figures")
    parser.add_argument("--no-kill", action="store_true")
    parser.add_argument("--compare", action="store_true", help="also train without clocks, and compare the digests")
    arguments = parser.parse_args()
    show_real_gpus()
    with tempfile.TemporaryDirectory(prefix="elastic-dvfs-") as name:
        base = Path(name)
        kind = replace(A100, application_mhz=CAPPED_MHZ) if arguments.mode == "speed" else A100
        standin = StandIn.made(base / "gpus", [kind] * 4)
        os.environ.update(standin.environment(build(base)), ELASTIC_CLOCKS=str(base / "clocks"))
        value, watcher, energy = trained(arguments.mode, standin, base, arguments, kills=not arguments.no_kill)
        found = {"mode": arguments.mode, "value": value, "energy": energy, "locked_at_the_end": standin.locked}
        if arguments.compare:
            found["value_without_clocks"] = _plain(arguments, standin, base)
        if arguments.svg is not None:
            arguments.svg.write_text(picture(arguments.mode, watcher.samples, steps_of(base, arguments.mode), watcher.killed_at))
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(found, indent=1))
        _show(found)


def _plain(arguments: argparse.Namespace, standin: StandIn, base: Path) -> Any:
    """Trains the same steps without clocks, and without a kill; GPUs take no time then, since no bit depends on it."""
    given = argparse.Namespace(**{**vars(arguments), "seconds": 0.0})
    directory = base / "plain"
    (directory / "claims").mkdir(parents=True)
    options = {"uuids": standin.uuids, "directory": str(directory / "claims"), "layers": given.layers, "width": 16, "seconds": 0.0}
    options |= {"beta": 1.0, "steps": given.steps, "micro_batches": given.micro_batches}
    return elastic.run(train, workers=4, stages=4, args=[options]).value


def _show(found: dict[str, Any]) -> None:
    energy = found["energy"]
    before, now = energy.get("usual"), energy.get("now")
    if before and now and before["joules"] and now["joules"]:
        took = " and ".join(f"{each['step_s']:.4g} s, {each['joules']:.4g} J" for each in (before, now))
        saved, longer = 1 - now["joules"] / before["joules"], now["step_s"] / before["step_s"] - 1
        print(
            f"a step with the usual and the chosen clocks: {took}: {-100 * saved:+.1f} % of the energy, {100 * longer:+.1f} % of the time"
        )
    print(f"clocks at the end: {'all as they were found' if not any(found['locked_at_the_end']) else found['locked_at_the_end']}")
    if "value_without_clocks" in found:
        same = found["value"] == found["value_without_clocks"]
        print(f"digests {'EQUAL: no bit depends on a clock' if same else 'DIFFER'}")
        if not same:
            sys.exit(1)


if __name__ == "__main__":
    main()
