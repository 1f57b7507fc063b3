"""Compares the clocks that a running job has chosen with the usual ones, in turns: a machine that becomes slower is slower for both.

Once the job has settled, its clocks are removed and set again by calls to the driver, every few steps. Seconds are those between two steps
that the job hands out, and joules those of the energy counters between the same moments. The first step of a turn does not count.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastic.power.nvml import Nvml


@dataclass(slots=True)
class Turn:
    """Steps at one setting: (seconds, joules) of each."""

    chosen: bool
    steps: list[tuple[float, float]] = field(default_factory=list)


class Turns:
    """Takes turns in a thread, and then stops the job as Ctrl-C does.

    `directory` is that of the run, and `log` the file to which the job writes a line for each step.
    """

    def __init__(self, uuids: list[str], directory: Path, log: Path, *, rounds: int, each: int) -> None:
        self._uuids, self._directory, self._log, self._rounds, self._each = uuids, directory, log, rounds, each
        self.turns: list[Turn] = []
        self.energy: dict[str, Any] = {}  # as the job has described it when it had settled
        self._read, self._at = 0, list[float]()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Turns:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _steps(self) -> list[float]:
        """Returns when each step was handed out. Only new lines are read: this thread shares its interpreter with the job's agent."""
        with suppress(OSError), self._log.open() as log:
            log.seek(self._read)
            while (line := log.readline()).endswith("\n"):
                self._read += len(line)
                self._at.append(json.loads(line)["at"])
        return self._at

    def _await(self, count: int) -> bool:
        """Waits until so many steps are handed out; False if the job ends before."""
        while len(self._steps()) < count:
            if self._over.wait(0.005):
                return False
        return True

    def _settled(self) -> bool:
        while self.energy.get("state") not in ("held", "undone"):
            if self._over.wait(0.1):
                return False
            try:
                self.energy = json.loads((self._directory / "energy.json").read_text())
            except (OSError, ValueError):
                continue
        return True

    def _run(self) -> None:
        if not self._settled():
            return
        nvml = Nvml()
        gpus = [nvml.gpu(uuid) for uuid in self._uuids]
        chosen = {stage["gpus"][0]: clock for stage, clock in zip(self.energy["stages"], self._clocks(), strict=True)}
        for number in range(2 * self._rounds):
            turn = Turn(chosen=number % 2 == 1)
            for gpu in gpus:
                if turn.chosen and (clock := chosen[gpu.uuid]):
                    gpu.lock(clock)
                else:
                    gpu.unlock()
            if not self._watched(turn, gpus):
                break
            self.turns.append(turn)
        nvml.close()
        os.kill(os.getpid(), signal.SIGINT)

    def _clocks(self) -> list[int | None]:
        """Returns the chosen clocks by stage; none if the job keeps the usual ones."""
        held, plan = self.energy["state"] == "held", self.energy["predicted"]
        return plan["chosen"]["clocks_mhz"] if held and plan is not None else [None] * len(self.energy["stages"])

    def _watched(self, turn: Turn, gpus: list[Any]) -> bool:
        before = None
        first = len(self._steps()) + 2  # the step under way has both settings
        for count in range(first, first + self._each + 1):
            if not self._await(count):
                return False
            joules = sum(gpu.energy_mj() for gpu in gpus) / 1000
            now = self._steps()[count - 1], joules
            if before is not None:
                turn.steps.append((now[0] - before[0], now[1] - before[1]))
            before = now
        return True

    def found(self) -> dict[str, Any]:
        """Returns medians of all steps of either setting, and how the neighbouring turns compare."""
        usual, chosen = ([step for turn in self.turns if turn.chosen is which for step in turn.steps] for which in (False, True))
        if not (usual and chosen):
            return {"turns": len(self.turns)}
        seconds = [statistics.median(step[0] for step in steps) for steps in (usual, chosen)]
        joules = [statistics.mean(step[1] for step in steps) for steps in (usual, chosen)]
        pairs = [
            statistics.median(step[0] for step in after.steps) / statistics.median(step[0] for step in before.steps) - 1
            for before, after in zip(self.turns[::2], self.turns[1::2], strict=False)
        ]
        return {
            "steps": [len(usual), len(chosen)],
            "usual": {"step_s": seconds[0], "joules": joules[0]},
            "chosen": {"step_s": seconds[1], "joules": joules[1]},
            "slower": seconds[1] / seconds[0] - 1,
            "slower_of_each_round": pairs,
            "joules_saved": 1 - joules[1] / joules[0],
        }
