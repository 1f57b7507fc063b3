"""`train` of `tests.recovery.packed` on the fake device."""

from __future__ import annotations

from tests.device import trainings
from tests.recovery import packed

__all__ = ["trainings"]

train = packed.train
