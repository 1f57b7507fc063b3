"""Faults as values, with a text form such as `1@8` that can be parsed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from elastic.errors import SettingsError
from elastic.observe.activity import RECOVERY_PHASES, STEP_PHASES

_FORM = re.compile(r"(?P<places>\d+(?:,\d+)*)@(?P<step>\d+)(?::(?P<phase>.*))?", re.DOTALL)
_HELP = "write a place, @ and a step, such as 1@8, 0@22:reduce or 1,2@8"


@dataclass(frozen=True, slots=True)
class Fault:
    """The death of the workers at `places` in `phase` of `step`, or at a random moment of it; place 0 is the coordinator.

    Several workers die together, when the first of them reaches the phase. A phase of a recovery means the first recovery after `step` has
    started. Raises SettingsError if places are missing, negative or named twice, if the step is negative, or if there is no such phase.
    """

    places: tuple[int, ...]
    step: int
    phase: str | None = None

    def __post_init__(self) -> None:
        if not self.places or min(self.places) < 0:
            raise SettingsError(f"places={self.places}: a fault needs at least one place, counted from 0")
        if len(set(self.places)) < len(self.places):
            raise SettingsError(f"{self}: a place is named twice; name each place once")
        if self.step < 0:
            raise SettingsError(f"{self}: steps are counted from 0")
        if self.phase is not None and self.phase not in (*STEP_PHASES, *RECOVERY_PHASES):
            raise SettingsError(f"{self}: there is no phase {self.phase!r}: use one of {', '.join((*STEP_PHASES, *RECOVERY_PHASES))}")

    def __str__(self) -> str:
        phase = "" if self.phase is None else f":{self.phase}"
        return f"{','.join(map(str, self.places))}@{self.step}{phase}"

    @property
    def in_recovery(self) -> bool:
        """Whether it hits a recovery, not a step."""
        return self.phase in RECOVERY_PHASES


def parse(text: str) -> Fault:
    """Parses the text form of a fault, the inverse of `str(fault)`. Raises SettingsError."""
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise SettingsError(f"{text!r} is not a fault: {_HELP}")
    return Fault(tuple(int(place) for place in match["places"].split(",")), int(match["step"]), match["phase"])


def in_order(faults: Iterable[Fault]) -> tuple[Fault, ...]:
    """Sorts faults by step; faults of the same step keep their order."""
    return tuple(sorted(faults, key=lambda fault: fault.step))
