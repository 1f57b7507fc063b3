"""Actions and schedules, printed and parsed: `2F0` is stage 2, forward, micro-batch 0, as in torch.distributed.pipelining."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Literal, NamedTuple, get_args

from elastic.errors import PlanError

ActionKind = Literal["F", "B", "I", "W"]
_KINDS: dict[str, ActionKind] = {kind: kind for kind in get_args(ActionKind)}
_ACTION = re.compile(r"(\d+)([FBIW])(\d+)")


class Action(NamedTuple):
    """One micro-batch through one stage: forward (F), backward (B), or a backward in two parts, of the input (I) and of the weights (W)."""

    stage: int
    kind: ActionKind
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


Schedule = Mapping[int, tuple[Action, ...]]
"""The actions of each worker, in the order in which it runs them."""

Cell = tuple[int, int]
"""A worker, and an index into its actions."""


def format(schedule: Schedule, marked: Collection[Cell] = ()) -> str:
    """Prints one line per worker, such as `3: 0F0 0F1 0B0 0B1`; marked cells as `>0F1<`."""
    return "\n".join(_line(worker, actions, {place for other, place in marked if other == worker}) for worker, actions in schedule.items())


def _line(worker: int, actions: Iterable[Action], marked: Collection[int]) -> str:
    cells = (f">{action}<" if place in marked else str(action) for place, action in enumerate(actions))
    return f"{worker}: {' '.join(cells)}".rstrip()


def parse(text: str) -> dict[int, tuple[Action, ...]]:
    """The inverse of `format`. Raises PlanError, naming the line or cell that it cannot read."""
    schedule: dict[int, tuple[Action, ...]] = {}
    for line in text.splitlines():
        worker, colon, cells = line.partition(":")
        if not (colon and worker.strip().isdecimal()) or int(worker) in schedule:
            raise PlanError(f"a line of a schedule starts with a worker that is on no other line, and a colon; this one does not: {line!r}")
        schedule[int(worker)] = tuple(_parse_action(cell) for cell in cells.split())
    return schedule


def _parse_action(cell: str) -> Action:
    match = _ACTION.fullmatch(cell)
    if match is None:
        raise PlanError(f"an action is written like 2F0 or 2B0, not {cell!r}")
    return Action(int(match[1]), _KINDS[match[2]], int(match[3]))
