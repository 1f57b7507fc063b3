"""What happens to the hosts of `examples/hosts.py`, from outside: the runtime is told nothing, but for the drain.

Each event does something, waits until the job has recorded an incident that names it, and until all hosts train again.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hosts_cluster import Cluster, Host

from elastic.memory.segment import MappedSegment
from elastic.observe.activity import ActivityReader
from elastic.observe.incident import Incident, timeline
from elastic.recovery.offers import Contents

Matches = Callable[[dict[str, Any]], bool]
SPLIT_S, SLOWED = 20.0, 10.0
_PERIOD_S = 0.1


@dataclass
class Record:
    """What was done, what the job was to record, and the incidents that it did record."""

    what: str
    expected: list[str] = field(default_factory=list)
    incidents: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def subjects(incident: dict[str, Any]) -> set[int]:
    """Returns the workers that an incident is about."""
    return {worker for worker in (incident["worker"], *incident["also"]) if worker is not None}


def headline(incident: dict[str, Any]) -> str:
    return timeline(Incident.from_json(incident)).splitlines()[0]


class Happening:
    """Does one event after another, and compares what the job records with what was done."""

    def __init__(self, cluster: Cluster, seed: int | None) -> None:
        self.cluster, self.random, self._anytime = cluster, random.Random(seed or 0), seed is not None
        self.records: list[Record] = []
        self._claimed: list[dict[str, Any]] = []
        self._before = 0  # how many incidents there were before the last event

    @property
    def unexplained(self) -> list[dict[str, Any]]:
        """Incidents that no event has caused. Work is shifted whenever a worker is slow, also by other programs of this machine."""
        return [each for each in self.cluster.incidents if each not in self._claimed and each["kind"] != "rebalance"]

    @property
    def disclaimed(self) -> set[int]:
        """The steps that the job took again after it had given them to loops, since copies of the state differed: it says so."""
        back = [each for each in self.cluster.incidents if each["went_back_to"] is not None]
        return {step for each in back for step in range(each["went_back_to"] + 1, each["step"] + 1)}

    @contextmanager
    def event(self, what: str) -> Iterator[None]:
        """An event, at the end of which all hosts train again."""
        self.records.append(Record(what))
        self._before = len(self.cluster.incidents)
        self.cluster.say(f"== {what}")
        yield
        self.cluster.settle()
        for each in self.unexplained:
            if each["joined"] and each["kind"] == "join":
                self._claim(each)

    def expect(self, what: str, matches: Matches, workers: set[int] | None = None) -> bool:
        """Waits for incidents that match, until they are about all these workers; returns whether there are."""
        record, began = self.records[-1], time.monotonic()
        record.expected.append(what)

        def found() -> list[dict[str, Any]]:
            fitting = [each for each in self.cluster.incidents if each not in self._claimed and matches(each)]
            about = set[int]().union(*map(subjects, fitting))
            return fitting if fitting and (workers is None or about == workers) else []

        try:
            incidents = self.cluster.until(f"the job records: {what}", found)
        except RuntimeError as error:
            record.missing.append(what)
            self.cluster.say(f"   MISSING: {error}")
            for each in self.cluster.incidents[self._before :]:
                self.cluster.say(f"   instead: {headline(each)}")
            return False
        for each in incidents:
            self._claim(each)
        self.cluster.say(f"   after {time.monotonic() - began:.1f} s: {what}")
        return True

    def _claim(self, incident: dict[str, Any]) -> None:
        self._claimed.append(incident)
        self.records[-1].incidents.append(incident)
        self.cluster.say(f"   {headline(incident)}")

    def host(self) -> Host:
        return self.random.choice(self.cluster.present)

    def worker(self) -> tuple[int, int]:
        """Returns any worker and its process."""
        return self.random.choice(sorted(self.host().workers.items()))

    # The events

    def lose_host(self) -> None:
        """A host vanishes without a word, and does not come back."""
        host = self.host()
        workers = set(host.workers)
        with self.event(f"the cable of host {host.number} is cut, and then its power"):
            self.cut(host)
            self.expect("its workers died, since their host was silent", death("it has been silent"), workers)
            self.cluster.kill(host)

    def split(self) -> None:
        """The network splits, and heals."""
        host = self.host()
        workers = set(host.workers)
        with self.event(f"the network splits host {host.number} off, for {SPLIT_S:g} s"):
            until = time.monotonic() + SPLIT_S
            self.cut(host)
            self.expect("its workers died, since their host was silent", death("it has been silent"), workers)
            time.sleep(max(0.0, until - time.monotonic()))
            self.cluster.network.heal(host.number)
            host.cut = False
            self.cluster.say("   the network is healed")
            self.expect("new workers of the host joined", self.joined)

    def cut(self, host: Host) -> None:
        self.cluster.network.cut(host.number)
        host.cut = True

    def kill_coordinator(self) -> None:
        """The agent that coordinates the job is killed; its launcher starts another one."""
        host = self.cluster.coordinator()
        workers = set(host.workers)
        with self.event(f"the agent that coordinates the job is killed, on host {host.number}"):
            os.kill(host.members["agent"], signal.SIGKILL)
            self.expect("its workers died, since the connection to their agent ended", death("its connection ended"), workers)
            self.expect("new workers of the host joined", self.joined)

    def stop_worker(self) -> None:
        """A worker's process is stopped, as by a debugger."""
        worker, pid = self.worker()
        with self.event(f"worker {worker} is stopped (SIGSTOP)"):
            os.kill(pid, signal.SIGSTOP)
            self.expect("it was evicted, since it was stopped", eviction("stopped"), {worker})
            self.expect("another worker joined", self.joined)

    def slow_worker(self) -> None:
        """A worker gets a tenth of the time."""
        worker, pid = self.worker()

        def named(incident: dict[str, Any]) -> bool:
            if incident["kind"] == "rebalance":
                return f"worker {worker} takes " in incident["why"]
            return eviction("crawling")(incident) and subjects(incident) == {worker}

        with self.event(f"worker {worker} gets a tenth of its time"), slowed(pid):
            self.expect("work was shifted from it, or it was evicted since it crawled", named)

    def flip(self) -> None:
        """One bit of one element of an optimizer state flips in a worker's memory."""
        host = self.host()
        worker = self.random.choice(sorted(host.workers))
        with self.event(f"a bit flips in the memory of worker {worker}"):
            layer, element = flip(host, worker, self.random, anytime=self._anytime)
            self.cluster.say(f"   it was one of exp_avg of layer {layer}, element {element}")

            def there(finding: dict[str, Any]) -> bool:
                return (finding["state"], finding["layer"]) == ("exp_avg", layer) and finding["start"] <= element < finding["stop"]

            def named(incident: dict[str, Any]) -> bool:
                return incident["kind"] == "damage" and subjects(incident) <= {worker} and any(map(there, incident["findings"]))

            self.expect("this state was found damaged", named)

    def drain(self) -> None:
        """A host is asked to leave: the others take over what its workers own, and no step is taken again."""
        host = self.host()
        workers, name = set(host.workers), host.name or ""
        with self.event(f"host {host.number} is drained"):
            if self.random.random() < 0.5:
                host.process.send_signal(signal.SIGTERM)
            else:
                self.cluster.ask("drain", name)
            self.expect("it left, and no step was taken again", lambda each: each["kind"] == "drain" and each["steps_redone"] == 0, workers)
            self.cluster.until("its agent ends", lambda: not host.alive)

    def add(self) -> None:
        """A new host joins."""
        with self.event("a new host is started"):
            self.cluster.add()
            self.expect("its workers joined", self.joined)

    @staticmethod
    def joined(incident: dict[str, Any]) -> bool:
        return bool(incident["joined"])


def death(why: str) -> Matches:
    """Matches deaths of workers with their host, of which this is said."""
    return lambda incident: incident["kind"] == "death" and why in (incident["why"] or "")


def eviction(cause: str) -> Matches:
    return lambda incident: (incident["kind"], incident["cause"]) == ("eviction", cause)


@contextmanager
def slowed(pid: int) -> Iterator[None]:
    """Stops and continues a process in turns, so that it runs a tenth of the time."""
    over, process = threading.Event(), os.pidfd_open(pid)

    def run() -> None:
        while not over.is_set():
            try:
                signal.pidfd_send_signal(process, signal.SIGSTOP)
                over.wait(_PERIOD_S * (1 - 1 / SLOWED))
                signal.pidfd_send_signal(process, signal.SIGCONT)
                over.wait(_PERIOD_S / SLOWED)
            except ProcessLookupError:  # it was evicted
                return

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        os.close(process)


def flip(host: Host, worker: int, generator: random.Random, *, anytime: bool) -> tuple[int, int]:
    """Flips one bit of one element of `exp_avg` in the memory of a worker that runs; returns layer and element.

    Unless `anytime`, it does so while the worker computes, when the state is at rest. Then the worker finds it before it counts.
    """
    for entry in Path(f"/proc/{host.workers[worker]}/fd").iterdir():
        if "memfd:elastic-segment" not in os.readlink(entry):
            continue
        descriptor = os.open(entry, os.O_RDWR)
        segment = MappedSegment(os.dup(descriptor))
        try:
            contents = Contents.read(segment, loop=False)
            if contents is None or contents.directory.worker != worker:
                continue  # it is another worker's, which this one reads
            place = generator.choice([each for each in contents.directory.places if each.role == "live" and "exp_avg" in each.states])
            offset, itemsize = place.states["exp_avg"]
            element = generator.randrange(place.stop - place.start)
            at = offset + element * itemsize + 2  # the highest bits of the fraction
            if not anytime:
                wait_for_rest(host, worker)
            os.pwrite(descriptor, bytes([os.pread(descriptor, 1, at)[0] ^ 0x40]), at)
            return place.layer, place.start + element
        finally:
            segment.close()
            os.close(descriptor)
    raise RuntimeError(f"worker {worker} of host {host.number} has no segment with optimizer state")


def wait_for_rest(host: Host, worker: int) -> None:
    """Returns when the worker begins to compute a micro-batch, or, without one, to collect gradients."""
    reader = ActivityReader(host.folder, worker)
    try:
        before = reader.read()
        while (now := reader.read()) is None or now == before or now.phase not in ("forward", "backward", "reduce"):
            time.sleep(0.0005)
    finally:
        reader.close()
