"""What a user may ask of a running job from outside, and the answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from elastic.agent import live
from elastic.host.channel import Message
from elastic.host.rundir import RunDirectory
from elastic.observe.journal import LinesReader
from elastic.observe.output import OutputReader

if TYPE_CHECKING:
    from elastic.agent.coordinator import Coordinator

_READ = 1 << 18  # bytes of a file at a time


def answer(coordinator: Coordinator, request: Message) -> Message:
    """Returns `{"told": ...}`, or `{"refused": reason}`, in which case nothing was done."""
    hosts, what = coordinator.hosts, request.get("what")
    if what == "status":
        return _told(status(coordinator))
    if what == "top":
        return _told(live.standing(coordinator))
    if what == "events":
        return _told(_events(coordinator, request["after"]))
    if what == "output":
        return answer_here(coordinator.record.directory, hosts.local.name, request)
    if what == "stop":
        coordinator.stop()
        return _told({"said": "the job stops at the next step boundary"})
    if coordinator.driver is None:
        return {"type": "answer", "refused": "the job has not begun to train: ask again when it has"}
    if what == "drain":
        name = request["host"]
        if name not in hosts.present:
            return {"type": "answer", "refused": f"no host {name!r} takes part; there are {', '.join(hosts.present)}"}
        left = coordinator.left_without(name)
        if left < coordinator.least:
            few = f"{left} workers would be left, and the job needs {coordinator.least}"
            return {"type": "answer", "refused": f"host {name} cannot be drained: {few}. `elastic stop` stops the job"}
        if (why := coordinator.no_room_without(hosts.workers_of(name))) is not None:
            return {"type": "answer", "refused": f"host {name} cannot be drained: {why}. `elastic stop` stops the job"}
        coordinator.drain(name)
        return _told({"said": f"host {name} is drained at the next step boundary"})
    if what == "kill":
        worker = request["worker"]
        living = sorted(number for number, each in hosts.workers.items() if not (each.ended or each.condemned))
        if worker not in living:
            return {"type": "answer", "refused": f"there is no worker {worker}; there are {', '.join(map(str, living))}"}
        hosts.end(worker, "its end was asked for")
        return _told({"said": f"worker {worker} is ended, and the others go on; if the job starts new workers, one takes its place"})
    if what == "scale":
        wanted, room = request["workers"], hosts.capacity
        if not coordinator.least <= wanted <= room:
            spares = sum(host.spares for host in hosts.present.values())
            more = f", of which {spares} {'is a spare' if spares == 1 else 'are spares'}" if spares else ""
            few = f"the hosts have room for {room}{more}, and the job needs {coordinator.least}"
            return {"type": "answer", "refused": f"{wanted} worker{'s' * (wanted != 1)}: {few}"}
        if (why := coordinator.no_room_without(sorted(coordinator.driver.state.live)[wanted:])) is not None:
            return {"type": "answer", "refused": f"{wanted} worker{'s' * (wanted != 1)}: {why}"}
        coordinator.scale(wanted)
        return _told({"said": f"the job is scaled to {wanted} worker{'s' * (wanted != 1)} at the next step boundary"})
    return {"type": "answer", "refused": f"this version does not know the request {what!r}"}


def status(coordinator: Coordinator) -> dict[str, Any]:
    """Returns the state of the job."""
    hosts, driver = coordinator.hosts, coordinator.driver
    view = None if driver is None else driver.view
    waiting = () if driver is None else sorted(driver.state.ready)
    members = () if view is None else view.workers
    steps = [hosts.worker(worker).step for worker in members]
    return {
        "phase": "founding" if driver is None else driver.state.phase.value,
        "epoch": 0 if view is None else view.epoch,
        "step": max((step for step in steps if step is not None), default=None),
        "layout": "" if view is None else view.plan.summary,
        "incidents": 0 if driver is None else len(driver.incidents),
        "coordinator": hosts.local.name,
        "wanted": hosts.room,
        "spares_wanted": hosts.spares,
        "copies": "" if view is None else view.copies,
        "copies_kept": None if view is None else view.copies_kept,
        "copies_wanted": None if view is None else view.site.copies,
        "hosts": [
            {
                "name": host.name,
                "room": host.room,
                "workers": [worker for worker in members if hosts.host_of(worker) == host.name],
                "spares": [worker for worker in waiting if hosts.host_of(worker) == host.name],
                "draining": host.name in hosts.draining,
                "rack": host.facts.rack,
            }
            for host in hosts.present.values()
        ],
    }


def _events(coordinator: Coordinator, after: int) -> dict[str, Any]:
    """Returns the events behind place `after` of the file, as many as fit, and the place up to which that is."""
    reader = LinesReader(coordinator.record.directory.events, after, most=_READ)
    return {"events": reader.read(), "next": reader.place}


def answer_here(directory: RunDirectory, host: str, request: Message) -> Message:
    """Answers a question about one host, `host`, whose agent need not coordinate: what its workers have printed, behind the places of
    their files in `after`, and the places up to which that is."""
    if request.get("what") != "output":
        return {"type": "answer", "refused": f"host {host} does not coordinate the job any more: ask again"}
    reader = OutputReader(directory.output, request["worker"], request["after"], most=_READ)
    lines = [[line.at, line.workers[0], line.stream, line.text] for line in reader.read()]
    return _told({"lines": lines, "next": reader.places})


def _told(what: dict[str, Any]) -> Message:
    return {"type": "answer", "told": what}
