"""A discrete-event simulation of one step: it makes the schedule, and it is the judge of how long a plan takes.

A worker runs its actions one after the other, each as soon as what it needs has arrived. A link carries one message at a time, in the
order in which they are sent, while both its ends compute on; different links do not slow each other down. When all members of a stage
have ended their last action the stage synchronises its gradients, and then each of them updates; a stage whose synchronisation takes no
time does not meet for it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from elastic.errors import PlanError
from elastic.plan.actions import Action, Schedule, refuse
from elastic.plan.plan import Stage
from elastic.plan.policy import ONE_F_ONE_B, Policy
from elastic.plan.scheduling import Scheduler
from elastic.plan.slicing import finish
from elastic.plan.timeline import Span, Timeline
from elastic.plan.timing import Timing
from elastic.plan.workload import Workload


def simulate(
    workload: Workload,
    stages: Sequence[Stage],
    routes: Sequence[Sequence[int]],
    *,
    policy: Policy = ONE_F_ONE_B,
    timing: Timing | None = None,
) -> tuple[dict[int, tuple[Action, ...]], float]:
    """The schedule (see `elastic.plan.schedule.build`) and the seconds until its last action ends."""
    return finish(simulating(workload, stages, routes, policy=policy, timing=timing))


def simulating(
    workload: Workload,
    stages: Sequence[Stage],
    routes: Sequence[Sequence[int]],
    *,
    policy: Policy = ONE_F_ONE_B,
    timing: Timing | None = None,
) -> Generator[None, None, tuple[dict[int, tuple[Action, ...]], float]]:
    """`simulate`, which can be left off every few milliseconds."""
    scheduler = Scheduler(workload, routes, timing or Timing.of(workload, stages), policy)
    yield
    seconds = yield from scheduler.running()
    return {worker: tuple(state.actions) for worker, state in scheduler.workers.items()}, seconds


def judge(
    workload: Workload,
    stages: Sequence[Stage],
    routes: Sequence[Sequence[int]],
    *,
    policy: Policy = ONE_F_ONE_B,
    timing: Timing | None = None,
) -> Timeline:
    """The whole step of a plan, scheduled under `policy`: actions, synchronisation and updates."""
    timing = timing or Timing.of(workload, stages)
    return run(simulate(workload, stages, routes, policy=policy, timing=timing)[0], timing)


def run(schedule: Schedule, timing: Timing) -> Timeline:
    """The step that follows a given schedule, whoever made it.

    Raises PlanError if it deadlocks, which prints the schedule with the actions marked that wait for ever, or if it names workers that
    `timing` does not.
    """
    if strangers := schedule.keys() - timing.stage.keys():
        raise PlanError(f"the schedule names workers {sorted(strangers)}, which are not among the members of the stages")
    replay = _Replay(schedule, timing)
    replay.run()
    spans = {worker: replay.spans[worker] for group in timing.members for worker in group}
    _end(spans, replay.free, timing)
    return Timeline(members=timing.members, spans={worker: tuple(each) for worker, each in spans.items()})


class _Replay:
    """Lets each worker run until it must wait, and again when what it waits for has arrived."""

    def __init__(self, schedule: Schedule, timing: Timing) -> None:
        self.schedule, self.timing, self.last = schedule, timing, len(timing.members) - 1
        self.home = {(stage, m): worker for worker, actions in schedule.items() for stage, kind, m in actions if kind == "F"}
        self.seconds = {
            worker: {"F": pace.forward_s, "B": pace.backward_s, "I": pace.inputs_s, "W": pace.weights_s}
            for worker, pace in timing.paces.items()
        }
        self.spans: dict[int, list[Span]] = {worker: [] for worker in timing.stage}
        self.free = dict.fromkeys(timing.stage, 0.0)
        self.arrived: dict[Action, float] = {}
        """When what each F, I and W needs has arrived; B needs what I needs."""
        self.waiting: dict[Action, int] = {}
        self.links: dict[tuple[int, int], tuple[float, float]] = {}

    def run(self) -> None:
        ready = list(self.schedule)
        while ready:
            ready += self._run_worker(ready.pop())
        if self.waiting:
            stuck = [(worker, len(self.spans[worker])) for worker in self.waiting.values()]
            refuse("deadlock: each marked action waits for one that cannot run", self.schedule, stuck)

    def _run_worker(self, worker: int) -> list[int]:
        """Runs what can be run, and gives the workers that waited for that."""
        woken: list[int] = []
        actions, spans, seconds, free = self.schedule[worker], self.spans[worker], self.seconds[worker], self.free[worker]
        for stage, kind, micro_batch in actions[len(spans) :]:
            need = Action(stage, "I" if kind == "B" else kind, micro_batch)
            arrival = 0.0 if kind == "F" and not stage else self.arrived.get(need)
            if arrival is None:
                self.waiting[need] = worker
                break
            start = max(arrival, free)
            free = start + seconds[kind]
            spans.append(Span(start, free, kind, micro_batch))
            for enabled in self._enable(stage, kind, micro_batch, worker, free):
                if (other := self.waiting.pop(enabled, None)) is not None:
                    woken.append(other)
        self.free[worker] = free
        return woken

    def _enable(self, stage: int, kind: str, micro_batch: int, worker: int, end: float) -> Sequence[Action]:
        """Notes the arrival of what an action gives; gives the actions that can start from then on."""
        if kind == "W":
            return ()
        enabled: list[Action] = []
        if kind == "I":
            enabled.append(Action(stage, "W", micro_batch))
            self.arrived[enabled[0]] = end
        if kind == "F" and stage == self.last:
            enabled.append(Action(stage, "I", micro_batch))
            self.arrived[enabled[-1]] = end
        elif kind == "F" or stage:
            action = Action(stage + 1, "F", micro_batch) if kind == "F" else Action(stage - 1, "I", micro_batch)
            receiver = self.home.get((action.stage, micro_batch))
            self.arrived[action] = end if receiver is None else self._sent(worker, receiver, end)
            enabled.append(action)
        return enabled

    def _sent(self, sender: int, receiver: int, end: float) -> float:
        if self.timing.links is None:
            return end
        seconds, free = self.links.get((sender, receiver)) or (self.timing.link_s(sender, receiver), 0.0)
        arrival = max(free, end) + seconds
        self.links[sender, receiver] = seconds, arrival
        return arrival


def _end(spans: dict[int, list[Span]], free: dict[int, float], timing: Timing) -> None:
    """Adds synchronisation and updates behind the actions; `free` is when each worker has ended these."""
    for group, sync_s in zip(timing.members, timing.sync_s, strict=True):
        if sync_s:
            start = max(free[worker] for worker in group)
            for worker in group:
                spans[worker].append(Span(start, start + sync_s, "sync"))
                free[worker] = start + sync_s
    everyone = max(free.values())
    for worker, each in spans.items():
        if update_s := timing.paces[worker].update_s:
            start = everyone if timing.barrier else free[worker]
            each.append(Span(start, start + update_s, "update"))
