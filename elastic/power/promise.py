"""What a choice of clocks promises, and whether measurements keep it. Pure."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from elastic.plan.clocks import Mode
from elastic.power.windows import Figures, ratio_of

KEPT = 0.5
"""The least share of a predicted gain that must show in the measurement."""

LONGER = 0.01
"""How much longer a measured step may take in the mode "energy", as a share: if it takes longer, other clocks are chosen."""

SLOWER = 0.015
"""How much longer it may take if no other clocks are left: `LONGER`, and noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """The predicted share that is gained over the figures with the usual clocks, and how the steps of those compare."""

    mode: Mode
    usual: Figures
    gain: float

    def longer(self, found: Figures) -> float:
        """Returns by what share steps take longer than with the usual clocks."""
        return ratio_of(found.typical, self.usual.typical) - 1

    def broken(self, found: Figures, most: float = SLOWER) -> str | None:
        """Returns why a measurement breaks the promise; None if it keeps it. `most`: how much longer a step may take, as a share."""
        longer = self.longer(found)
        now_s, before_s = statistics.median(found.typical), statistics.median(self.usual.typical)
        if self.mode == "speed":
            if -longer >= KEPT * self.gain:
                return None
            return f"steps take {now_s:.3g} s instead of {before_s:.3g} s before, and {100 * self.gain:.1f} % were promised"
        if longer > most:
            return f"steps take {now_s:.4g} s, and {before_s:.4g} s before"
        return self._dear(found)

    def _dear(self, found: Figures) -> str | None:
        """Returns why too few joules are saved; None if enough are, or they are not known."""
        now_j, before_j = found.joules, self.usual.joules
        if now_j is None or before_j is None or before_j <= 0:  # none: a counter that stands still
            return None
        if 1 - now_j / before_j >= KEPT * self.gain:
            return None
        return f"a step takes {now_j:.4g} J instead of {before_j:.4g} J before, and {100 * self.gain:.1f} % less were promised"

    def kept(self, found: Figures) -> str:
        """Returns a sentence with both figures."""
        now_j, before_j = found.joules, self.usual.joules
        now, before = ("", "") if now_j is None or before_j is None else (f" and {now_j:.4g} J", f" and {before_j:.4g} J")
        now_s, before_s = statistics.median(found.typical), statistics.median(self.usual.typical)
        return f"measured with these clocks: {now_s:.4g} s{now} a step, instead of {before_s:.4g} s{before}"
