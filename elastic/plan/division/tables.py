"""The values of a cost model for one micro-batch size and number of replicas, as arrays; and the step time that follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elastic.plan.division.rules import Floats, Transfers, pipeline_seconds

UNLIMITED = 1 << 30


class StageCut(NamedTuple):
    """A stage: layers `[start, stop)`, served by the makeup with this index."""

    start: int
    stop: int
    makeup: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tables:
    """The arrays of a cost model, for F makeups, n = layers + 1, K resources.

    `seconds`, `update_s`, `sync_s` and `most_in_flight` have shape (F, n, n), by first layer and one past the last; `forward_s` and
    `backward_s` have shape (F, F, n), by sender, receiver and boundary. `most_in_flight` is how many micro-batches fit into memory (0: not
    even one). `units` (F, K) is how much one stage of a makeup takes of each resource; `available` (K,) is how much there is.
    """

    micro_batches: int
    transfers: Transfers
    seconds: Floats
    update_s: Floats
    sync_s: Floats
    most_in_flight: NDArray[np.int64]
    forward_s: Floats
    backward_s: Floats
    units: NDArray[np.int64]
    available: NDArray[np.int64]

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return self.seconds.shape[1] - 1

    @property
    def makeups(self) -> int:
        """How many makeups there are."""
        return self.seconds.shape[0]


def stage_seconds(tables: Tables, cuts: Sequence[StageCut]) -> list[float]:
    """Returns the seconds of computation and transfers of each stage, for one micro-batch."""
    depth = len(cuts)
    found: list[float] = []
    for number, (start, stop, makeup) in enumerate(cuts):
        onward = float(tables.forward_s[makeup, cuts[number + 1].makeup, stop]) if number + 1 < depth else 0.0
        back = float(tables.backward_s[makeup, cuts[number - 1].makeup, start]) if number else 0.0
        found.append(float(tables.seconds[makeup, start, stop]) + tables.transfers.seconds(number, depth, onward, back))
    return found


def step_seconds(tables: Tables, cuts: Sequence[StageCut]) -> float:
    """Returns the seconds of the pipeline, plus the slowest update and the slowest synchronisation."""
    update = max(float(tables.update_s[makeup, start, stop]) for start, stop, makeup in cuts)
    sync = max(float(tables.sync_s[makeup, start, stop]) for start, stop, makeup in cuts)
    return pipeline_seconds(stage_seconds(tables, cuts), tables.micro_batches) + update + sync
