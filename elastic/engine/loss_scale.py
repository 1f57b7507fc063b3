"""Scales losses, so that gradients in float16 do not vanish: a power of two, which the owners of the gradients divide out again.

After a step whose gradient is not finite, which is skipped, the scale is half as large; after GROWS_AFTER steps in a row without one it is
twice as large. These are the rules and numbers of `torch.amp.GradScaler`. The scale follows from the steps that were applied, so it is part
of the training's settings: it is sent to workers that join, saved in checkpoints, and goes back with a step that is taken again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from elastic.errors import TrainerError

FIRST = 2.0**16
GROWS_AFTER = 2000
DYNAMIC = "dynamic"


@dataclass(eq=False)
class LossScale:
    """The present scale: `value`, and how many steps in a row had a finite gradient with it. `dynamic`: it changes by itself."""

    value: float = FIRST
    finite: int = 0
    dynamic: bool = True

    @classmethod
    def of(cls, given: Any) -> LossScale | None:
        """Reads the Trainer's argument `loss_scale`. Raises TrainerError for a value that is none."""
        if given is None:
            return None
        if given == DYNAMIC:
            return cls()
        number = isinstance(given, int | float) and not isinstance(given, bool)
        if number and math.isfinite(given) and given > 0 and math.frexp(given)[0] == 0.5:
            return cls(value=float(given), dynamic=False)
        raise TrainerError(
            f"loss_scale={given!r}: use 'dynamic', or a power of two such as 1024.0 (others would round gradients), or None for no scale"
        )

    def after(self, *, skipped: bool) -> None:
        """Notes that a step was applied, or `skipped` since its gradient was not finite."""
        if not self.dynamic:
            return
        if skipped:
            self.value, self.finite = self.value / 2.0, 0
        else:
            self.finite += 1
            if self.finite == GROWS_AFTER:
                self.value, self.finite = self.value * 2.0, 0

    @property
    def can_shrink(self) -> bool:
        """Whether a smaller scale may help against a gradient that is not finite."""
        return self.dynamic and self.value > 1.0
