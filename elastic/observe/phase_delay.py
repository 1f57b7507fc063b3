"""An aid to inject faults in short phases: workers wait at the beginning of a phase, so that a fault injector that polls them can hit it.

All workers of a job do so if its run directory holds `phase-delay.json` when it starts. Waiting takes time and changes no bit.
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
    """Makes workers wait for `seconds` when one of `phases` begins; phases of a step only in this `step` (None: in every one).

    Raises SettingsError if there is no such phase.
    """

    phases: tuple[str, ...]
    seconds: float
    step: int | None = None

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.phases).difference(PHASES)):
            raise SettingsError(f"{NAME}: there is no phase {', '.join(unknown)}: use {', '.join(PHASES)}")

    def __call__(self, phase: str, step: int) -> None:
        """Waits, if required, in `phase`, which this worker has just entered."""
        if phase in self.phases and (self.step in (None, step) or phase not in STEP_PHASES):
            time.sleep(self.seconds)


def write(directory: Path | str, phases: Iterable[str], seconds: float, step: int | None = None) -> None:
    """Makes the workers of the next job in this run directory wait in `phases`."""
    phase_delay = PhaseDelay(phases=tuple(phases), seconds=seconds, step=step)
    Path(directory, NAME).write_text(json.dumps(asdict(phase_delay)))


def read(directory: Path | str) -> PhaseDelay | None:
    """Reads what `write` has written, None if there is no file. Raises SettingsError if it has other contents."""
    path = Path(directory, NAME)
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text())
        return PhaseDelay(phases=tuple(data["phases"]), seconds=float(data["seconds"]), step=data["step"])
    except (ValueError, TypeError, KeyError) as error:
        raise SettingsError(f"{directory}/{NAME} is not what `elastic.observe.phase_delay.write` writes: {error}") from error
