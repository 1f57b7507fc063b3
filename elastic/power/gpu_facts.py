"""What is known of a worker's GPU before its clocks are measured."""

from __future__ import annotations

from dataclasses import dataclass

from elastic.power.nvml import SupportedClocks

SWEEP = (1.0, 0.9, 0.75, 0.6)
"""Clocks that are measured besides the highest, as shares of the usual one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    """A worker's GPU: its UUID and clocks, the usual one under load, and the watts that it took before training began."""

    uuid: str
    clocks: SupportedClocks
    usual_mhz: int
    idle_w: float

    def nearest(self, mhz: float) -> int:
        """Returns the supported clock that is nearest to `mhz`."""
        return min(self.clocks.graphics, key=lambda each: (abs(each - mhz), -each))

    @property
    def swept(self) -> tuple[int, ...]:
        """The clocks to be measured, the usual one first; fewer than three if the GPU has no more."""
        shares = [self.nearest(share * self.usual_mhz) for share in SWEEP]
        return tuple(dict.fromkeys([self.usual_mhz, *shares[1:], max(self.clocks.graphics)]))
