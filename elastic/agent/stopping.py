"""Describes what a job that was asked to stop still waits for, if it has not ended some seconds later."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping

from elastic.worker.onesided_waits import Wait

FIRST_S, AGAIN_S = 5.0, 30.0
"""How long after the request, and then how often, the user is informed."""

_FRESH_S = 3.0  # workers report every second where they wait


class StopProgress:
    """The last reported place of each worker. All times are of one monotonic clock."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Wait, float]] = {}

    def heard(self, worker: int, wait: Wait, now: float | None = None) -> None:
        """Records that a worker has been waiting, or in the user's own code, for long."""
        self._seen[worker] = wait, time.monotonic() if now is None else now

    def sentence(
        self, asked_s: float, members: Collection[int], steps: Mapping[int, int | None], returned: Collection[int], now: float | None = None
    ) -> str:
        """Returns the message to the user `asked_s` seconds after the request. `steps` has the newest step of each member."""
        moment = time.monotonic() if now is None else now
        places: dict[str, list[int]] = {}
        for worker in members:
            wait, at = self._seen.get(worker, (None, 0.0))
            fresh = wait if moment - at <= _FRESH_S else None
            places.setdefault(_place(fresh, steps.get(worker), worker in returned), []).append(worker)
        waiting = "; ".join(f"{_workers(each)} {place}" for place, each in places.items())
        return f"the job was asked to stop {asked_s:.0f} s ago, and has not ended yet: {waiting}. Ask again to stop at once"


def _place(wait: Wait | None, step: int | None, returned: bool) -> str:
    if returned:
        return "returned from train_fn"
    if wait is None:
        return "in train_fn, before its first step" if step is None else f"last seen in step {step}"
    when = f"after step {wait.step}" if wait.step >= 0 else "before the first step"
    if wait.busy:
        return f"in the code of train_fn {when} {wait.what}"
    if wait.computes:
        return f"computing step {wait.step}, or waiting for the others in it"
    if wait.leaves:
        return f"returned from train_fn {when}, and saving"
    return f"in {wait.what} {when}, with the others or waiting for them"


def _workers(workers: Collection[int]) -> str:
    return f"worker{'s' * (len(workers) > 1)} {', '.join(map(str, workers))}"
