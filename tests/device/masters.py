"""`outliving.train` on the fake device, with the cases that have float32 masters."""

from __future__ import annotations

from tests.device import trainings
from tests.recovery import mastered

__all__ = ["mastered"]

train = trainings.train
