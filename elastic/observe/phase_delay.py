"""An aid for faults in short phases: workers wait where a phase begins, so that whoever polls what they are doing can hit it.

A run directory that holds `phase-delay.json` when its job starts has all workers do so. Waiting changes no bit: it only takes time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from elastic.errors import SettingsError
from elastic.observe.activity import PHASES, STEP_PHASES

NAME = "phase-delay.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseDelay:
    """Workers wait for `seconds` where one of `phases` begins; where it is a phase of a step, in this `step` only (None: in every one).

    Raises SettingsError if there is no such phase.
    """

    phases: tuple[str, ...]
    seconds: float
    step: int | None = None

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.phases).difference(PHASES)):
            raise SettingsError(f"{NAME}: there is no phase {', '.join(unknown)}: use {', '.join(PHASES)}")

    def __call__(self, phase: str, step: int) -> None:
        """This worker has just entered `phase`."""
        if phase in self.phases and (self.step in (None, step) or phase not in STEP_PHASES):
            time.sleep(self.seconds)


def write(directory: Path | str, phases: Iterable[str], seconds: float, step: int | None = None) -> None:
    """Has the workers of the next job in this run directory wait there."""
    phase_delay = PhaseDelay(phases=tuple(phases), seconds=seconds, step=step)
    Path(directory, NAME).write_text(json.dumps(asdict(phase_delay)))


def read(directory: Path | str) -> PhaseDelay | None:
    """What `write` has written, None if nothing. Raises SettingsError if it is something else."""
    path = Path(directory, NAME)
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text())
        return PhaseDelay(phases=tuple(data["phases"]), seconds=float(data["seconds"]), step=data["step"])
    except (ValueError, TypeError, KeyError) as error:
        raise SettingsError(f"{directory}/{NAME} is not what `elastic.observe.phase_delay.write` writes: {error}") from error
