"""The delay of messages between stages, learned from a step that lower clocks made longer than predicted. Pure.

A stage whose work takes nearly as long as the bottleneck's has no time left in which messages, their handling and irregular seconds of its
work could hide: each turn of a micro-batch between two stages then makes the bottleneck wait. With the usual clocks none of this shows, so
it cannot be measured before. All of it is described as one delay of every message, which makes the predicted step as much longer as the
measured one was. The next choice of clocks counts with it.
"""

from __future__ import annotations

from collections.abc import Sequence

from elastic.plan.step_order import StepOrder

_COARSE, _FINE = 16, 10


def message_delay(steps: StepOrder, stretches: Sequence[float], longer: float, most_s: float) -> float:
    """Returns the delay in seconds, from 0 to `most_s`, with which `stretches` make the step `longer` times as long as no stretch does.

    It is the smallest one; if there is none, the one with which the step becomes longest.
    """
    usual = [1.0] * len(stretches)

    def ratio(message_s: float) -> float:
        before, after = steps.delayed(message_s).steps_s([usual, stretches])
        return after / before if before > 0 else 1.0

    tried = [most_s * number / _COARSE for number in range(_COARSE + 1)]
    found = [ratio(message_s) for message_s in tried]
    first = next((number for number, each in enumerate(found) if each >= longer), None)
    if first is None:
        return tried[found.index(max(found))]
    if first == 0:
        return 0.0
    low, high = tried[first - 1], tried[first]
    for _ in range(_FINE):
        middle = (low + high) / 2
        low, high = (low, middle) if ratio(middle) >= longer else (middle, high)
    return high
