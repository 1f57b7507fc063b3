"""The cells of `kill_table.py`: the faults for a job, one cell for each phase and kind of worker."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import combinations, cycle
from pathlib import Path
from typing import Any

from killing import DELAY_S, STEP, WORKERS, End, KillCell, Scene

from elastic.chaos.faults import Fault
from elastic.layout.replicas import Spots, replica_holders
from elastic.observe.activity import RECOVERY_PHASES, STEP_PHASES

_SHORT = ("reduce", "ready", "apply", "gather", "replicate", *RECOVERY_PHASES)


def victims(record: Mapping[str, Any]) -> dict[str, int]:
    """Returns the places of a worker alone in its stage, of one that shares its stage, and of the coordinator; all three differ."""
    stages = [member["stage"] for member in record["members"]]
    alone = [place for place, stage in enumerate(stages) if stages.count(stage) == 1 and place > 0]
    others = [place for place, stage in enumerate(stages) if stages.count(stage) > 1 and place > 0]
    return {"stage of one": alone[-1], "stage of several": others[0], "place 0": 0}


def another(record: Mapping[str, Any], place: int) -> int:
    """Returns another worker's place."""
    return (place + 2) % len(record["members"])


def in_step(phase: str, who: str) -> KillCell:
    def plan(scene: Scene) -> None:
        scene.shoot(Fault((victims(scene.members())[who],), STEP, phase))

    return KillCell(name=f"step: {phase}: {who}", plan=plan, delays=(phase,) if phase in _SHORT else (), deaths=1)


def in_recovery(phase: str, who: str) -> KillCell:
    def plan(scene: Scene) -> None:
        record = scene.members()
        place = victims(record)[who]
        scene.shoot(Fault((another(record, place),), STEP, "backward"), Fault((place,), STEP, phase))

    return KillCell(name=f"recovery: {phase}: {who}", plan=plan, delays=(phase,), deaths=1, respawn=True)


def in_join(phase: str, who: str | None) -> KillCell:
    """Kills a worker while another one joins; with `who` None, the joining worker."""

    def plan(scene: Scene) -> None:
        record = scene.members()
        place = victims(record)[who or "place 0"]
        worker = record["members"][place]["worker"] if who else WORKERS
        scene.shoot(Fault((another(record, place),), STEP, "forward"))
        scene.members(2)
        scene.hit(worker, phase, 2 if who else 0)

    return KillCell(name=f"join: {phase}: {who or 'the joiner'}", plan=plan, delays=(phase,), joins=True, respawn=True)


def before_first_step(who: str) -> KillCell:
    def plan(scene: Scene) -> None:
        record = scene.members()
        found = victims(record)
        scene.shoot(Fault((found["stage of several"],), STEP, "backward"))
        scene.hit(record["members"][found[who]]["worker"], "ready", 2)  # earlier phases are short: little is computed again

    return KillCell(name=f"before the first step of the new view: {who}", plan=plan, delays=("ready",), deaths=1)


def while_committing(who: str) -> KillCell:
    """Stops etcd from the gate on, so that the second worker dies during the commit of the first recovery."""

    def plan(scene: Scene) -> None:
        record = scene.members()
        place = victims(record)[who]
        runtime = record["members"][place]["worker"]
        first = record["members"][another(record, place)]["worker"]
        others = [member["worker"] for member in record["members"] if member["worker"] != first]
        etcd = etcd_of(record["agent"])
        scene.seen(first, None, 1, STEP)
        scene.hit(first, "backward", 1)
        scene.seen(runtime, "gate", 1)
        with stopped(etcd):
            for worker in others:
                scene.seen(worker, "commit", 1)
            time.sleep(DELAY_S)  # their votes arrive
            scene.hit(runtime, "commit", 1)
            time.sleep(DELAY_S)

    return KillCell(name=f"recovery: etcd commits: {who}", plan=plan, delays=("gate",), deaths=1, respawn=True)


def etcd_of(agent: int) -> int:
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return next(int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text().strip() == "etcd")


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def at_once(phase: str, places: tuple[int, ...]) -> KillCell:
    """Kills several workers at the same moment of a step."""

    def plan(scene: Scene) -> None:
        scene.shoot(Fault(places, STEP, phase))

    delays = (phase,) if phase in _SHORT else ()
    return KillCell(name=f"step: {phase}: {_named(places)}", plan=plan, delays=delays, respawn=len(places) == WORKERS)


def at_once_in_recovery(phase: str, first: int, places: tuple[int, ...]) -> KillCell:
    """Kills several workers at the same moment of the recovery from the death of another one."""

    def plan(scene: Scene) -> None:
        scene.shoot(Fault((first,), STEP, "backward"), Fault(places, STEP, phase))

    name = f"recovery: {phase}: {_named(places)}{', all that are left' * (len(places) == WORKERS - 1)}"
    return KillCell(name=name, plan=plan, delays=(phase,), respawn=True)


def _named(places: tuple[int, ...]) -> str:
    return "all places" if len(places) == WORKERS else f"places {', '.join(map(str, places))}"


def any_at_once() -> list[KillCell]:
    """Two, three and all workers at once, in every phase; the sets of two and three take turns."""
    everyone = tuple(range(WORKERS))
    found = []
    for size in range(2, WORKERS + 1):
        sets = cycle(combinations(everyone, size))
        found += [at_once(phase, next(sets)) for phase in STEP_PHASES]
    for size in range(2, WORKERS):
        sets = cycle(combinations(everyone, size))
        for phase in RECOVERY_PHASES:
            places = next(sets)
            first = next(place for place in everyone if place not in places)
            found.append(at_once_in_recovery(phase, first, places))
    return found


def with_checkpoints(places: tuple[int, ...], *, segments: bool) -> KillCell:
    """Kills workers of a job that saves checkpoints: it reloads one only if its state dies with the workers."""

    def plan(scene: Scene) -> None:
        scene.shoot(Fault(places, STEP, "backward"))

    name = f"with checkpoints{', without segments' * (not segments)}: {_named(places)}"
    return KillCell(name=name, plan=plan, saves=True, segments=segments, respawn=True)


def on_the_way_back(phase: str) -> KillCell:
    """Kills two workers whose loss requires a checkpoint, and a third one during that recovery."""

    def plan(scene: Scene) -> None:
        record = scene.members()
        pair = (2, holder(record, 2))
        third = next(place for place in range(len(record["members"])) if place not in pair)
        scene.shoot(Fault(pair, STEP, "backward"), Fault((third,), STEP, phase))

    return KillCell(name=f"back to a checkpoint: {phase}", plan=plan, delays=(phase,), saves=True, segments=False, respawn=True)


def holder(record: Mapping[str, Any], place: int) -> int:
    """Returns the place of the worker that holds the replica of the one at `place`, in the first view of a job without segments."""
    members = record["members"]
    in_stages = sorted(range(len(members)), key=lambda other: members[other]["stage"])
    return replica_holders(Spots(in_stages))[place][0]


def process(name: str, title: str, end: End) -> KillCell:
    def plan(scene: Scene) -> None:
        record = scene.members()
        scene.seen(record["coordinator"], None, 1, STEP)
        scene.end(name)

    return KillCell(name=f"process: {title}", plan=plan, end=end)


def cells() -> list[KillCell]:
    everyone = tuple(range(WORKERS))
    return [
        *(in_step(phase, who) for phase in STEP_PHASES for who in ("stage of one", "stage of several", "place 0")),
        *(in_recovery(phase, who) for phase in RECOVERY_PHASES for who in ("stage of one", "stage of several", "place 0")),
        *any_at_once(),
        *(while_committing(who) for who in ("stage of several", "place 0")),
        *(before_first_step(who) for who in ("stage of one", "place 0")),
        *(in_join(phase, who) for phase in RECOVERY_PHASES for who in ("stage of several", "place 0", None)),
        with_checkpoints(everyone, segments=True),
        with_checkpoints(everyone, segments=False),
        *(on_the_way_back(phase) for phase in RECOVERY_PHASES),
        process("agent", "the agent", End(error="HostLost", says=("the agent, which supervises the workers, died",))),
        process("forkserver", "the fork server", End(error="JobFailed", says=("the fork server, parent of the workers, died",))),
    ]
