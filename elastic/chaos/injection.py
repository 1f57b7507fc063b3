"""One fault as a value: what, when, to whom, for how long; with a text form such as `kill@12:backward place=1`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from elastic.chaos.kinds import Kind, kind_of
from elastic.errors import SettingsError
from elastic.observe.activity import RECOVERY_PHASES

_FORM = re.compile(r"(?P<kind>[a-z-]+)@(?P<at>\d+(?:\.\d+)?)(?P<unit>s)?(?::(?P<phase>\w+))?(?P<rest>( \w+=\S+)*)")
_COUNTS, _REALS = ("place", "count", "host"), ("seconds", "factor")
_FACTORS = {"slow": 4.0, "delay": 50.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Injection:
    """One fault of this `kind`.

    It is due `time` seconds after the first step of the job, or when `step` is reached: in `phase` of it, or at its beginning. A phase of a
    recovery is for `kill-during-recovery` alone, whose first victim dies in `step`. `place` chooses the victim among the members of the
    view at that moment, and `host` among the hosts that take part, both modulo their number. `count` is the number of victims of
    `kill-many`, `seconds` the duration, `factor` how slow a worker becomes, or the milliseconds of a delay.
    `settled`: it also waits until all hosts train together, so that there are copies of all state. Raises SettingsError.
    """

    kind: str
    time: float | None = None
    step: int | None = None
    phase: str | None = None
    place: int = 0
    host: int = 0
    count: int = 2
    seconds: float | None = None
    factor: float | None = None
    settled: bool = False

    def __post_init__(self) -> None:
        kind = kind_of(self.kind)
        for name in (*_COUNTS, "step", *_REALS, "time"):
            self._check_number(name)
        if (self.time is None) == (self.step is None):
            raise SettingsError(f"{self.kind}: give either a time (seconds after the first step) or a step")
        self._check_phase()
        if self.seconds is not None and kind.seconds is None:
            raise SettingsError(f"{self}: {self.kind} is over at once; leave seconds out")
        if not isinstance(self.settled, bool):
            raise SettingsError(f"{self.kind}: settled={self.settled!r} is not true or false")
        if self.factor is not None and (self.kind not in _FACTORS or self.factor < 1):
            raise SettingsError(f"{self}: factor is for slow (how many times as slow) and delay (milliseconds), and at least 1")
        if self.kind == "slow" and (self.strength <= 1 or self.lasts_s <= 0):
            raise SettingsError(f"{self}: a worker is slow with a factor above 1, for some seconds")

    def _check_number(self, name: str) -> None:
        value = getattr(self, name)
        number = int if name in (*_COUNTS, "step") else (int, float)
        if (value is not None or name in _COUNTS) and (
            not isinstance(value, number) or isinstance(value, bool) or not (name == "count") <= value < math.inf
        ):
            raise SettingsError(f"{self.kind}: {name}={value!r} is not a number of at least {int(name == 'count')}")

    def _check_phase(self) -> None:
        if self.phase is None:
            return
        known = self.of.phases
        if not known:
            raise SettingsError(f"{self.kind}: it waits for no phase: leave {self.phase!r} out")
        if self.phase not in known:
            raise SettingsError(f"{self.kind}: there is no phase {self.phase!r}: use one of {', '.join(known)}")
        if self.step is None and known != RECOVERY_PHASES:
            raise SettingsError(f"{self.kind}: a phase needs a step, not a time")

    @property
    def of(self) -> Kind:
        """Its kind, with what that needs."""
        return kind_of(self.kind)

    @property
    def lasts_s(self) -> float:
        """Its duration in seconds."""
        return (self.of.seconds or 0.0) if self.seconds is None else self.seconds

    @property
    def strength(self) -> float:
        """Its factor, or the kind's default."""
        return _FACTORS.get(self.kind, 1.0) if self.factor is None else self.factor

    def __str__(self) -> str:
        at = f"{self.time:g}s" if self.step is None and self.time is not None else f"{self.step}"
        phase = "" if self.phase is None else f":{self.phase}"
        rest = "".join(f" {name}={value:g}" for name, value in self._given().items())
        return f"{self.kind}@{at}{phase}{rest}{' settled=1' if self.settled else ''}"

    def _given(self) -> dict[str, float]:
        defaults = {each.name: each.default for each in fields(self)}
        values = {name: getattr(self, name) for name in (*_COUNTS, *_REALS)}
        return {name: value for name, value in values.items() if value != defaults[name] and isinstance(value, int | float)}

    def to_json(self) -> dict[str, Any]:
        """Returns the fields that differ from their defaults."""
        defaults = {each.name: each.default for each in fields(self)}
        return {name: getattr(self, name) for name in defaults if getattr(self, name) != defaults[name]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Injection:
        """The inverse of `to_json`. Raises SettingsError for fields that do not exist."""
        known = [each.name for each in fields(cls)]
        if unknown := sorted(set(data).difference(known)):
            raise SettingsError(f"a fault has no {', '.join(unknown)}: use {', '.join(known)}")
        if "kind" not in data:
            raise SettingsError("a fault needs a kind, such as kind = 'kill'")
        return cls(**data)


def parse(text: str) -> Injection:
    """Parses the text form, the inverse of `str(injection)`: `kill@12`, `stop@3.5s place=1 seconds=2`. Raises SettingsError."""
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise SettingsError(
            f"{text!r} is not a fault: write a kind, @ and a step or seconds, such as kill@12:backward or stop@3.5s place=1"
        )
    data: dict[str, Any] = {"kind": match["kind"], "phase": match["phase"]}
    if match["unit"]:
        data["time"] = float(match["at"])
    elif match["at"].isdigit():
        data["step"] = int(match["at"])
    else:
        raise SettingsError(f"{text!r}: a step is a whole number; seconds end with s, such as 3.5s")
    for pair in match["rest"].split():
        name, _, value = pair.partition("=")
        try:
            data[name] = int(value) if name in _COUNTS else bool(int(value)) if name == "settled" else float(value)
        except ValueError:
            raise SettingsError(f"{text!r}: {name}={value} is not a number") from None
    return Injection.from_json(data)
