"""What a worker's segment says of its contents, and the inventory that an agent offers from it when the worker has died. Pure values.

The marks say of which step the owned shards, the replicas of others', and the previous copies of both are complete (NONE: they are being
written). The *directory* record says where each copy lies. It has two slots, each with marks of its own: a new directory is written beside
the one in force, and comes into force when its number is stored; then the old one is emptied. The records of scalars and of digests have a
slot for even steps and one for odd ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from elastic.layout.transfer import PARAM, Role
from elastic.memory.segment import NONE, SLOTS
from elastic.recovery.inventory import Copy, FinishedGrains, Inventory, Scalars

DIRECTORY, SCALARS, DIGESTS, SUMS, REPLICA_SCALARS, BUFFERS, LOOP = range(7)
"""Numbers of the records. `SUMS` has the gradient sums of the step under way. The last two are there in case that all workers die: the
buffers that training changes as of a step, and an inventory without copies, which says how far the loop is and has the settings."""

_LIVE, _PREVIOUS, _REPLICA, _PREVIOUS_REPLICA = range(4)


ByCopy = dict[str, dict[str, str]]
"""Digests of copies as they were complete, by `layer:start` and state."""


def live_mark(slot: int) -> int:
    """Returns the number of the mark with the step of the owned shards, of the directory in this slot."""
    return 4 * slot + _LIVE


def previous_mark(slot: int) -> int:
    """Returns the number of the mark with the step of the previous copies, of the directory in this slot."""
    return 4 * slot + _PREVIOUS


def replica_mark(slot: int) -> int:
    """Returns the number of the mark with the step of the replicas, of the directory in this slot."""
    return 4 * slot + _REPLICA


def previous_replica_mark(slot: int) -> int:
    """Returns the number of the mark with the step of the replicas' previous copies, of the directory in this slot."""
    return 4 * slot + _PREVIOUS_REPLICA


def number_of(step: int) -> int:
    """Returns the number under which a record of a step is written, above 0."""
    return step + 2


def slot_of(step: int) -> int:
    """Returns the slot for a record of a step: those of two consecutive steps differ."""
    return step % SLOTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A copy in a segment: for each state, the offset of its first byte and the bytes of one element.

    `step` is that of a copy which does not change; None for owned shards, replicas and their previous copies: the marks have their steps.
    """

    role: Role
    layer: int
    start: int
    stop: int
    states: Mapping[str, tuple[int, int]]
    step: int | None = None

    def to_json(self) -> list[Any]:
        """One flat list."""
        return [self.role, self.layer, self.start, self.stop, self.states, self.step]

    @classmethod
    def from_json(cls, data: list[Any]) -> Place:
        """The inverse of `to_json`."""
        role, layer, start, stop, states, step = data
        places = {state: (at, size) for state, (at, size) in states.items()}
        return cls(role=role, layer=layer, start=start, stop=stop, states=places, step=step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Directory:
    """The places of all copies in a segment. `states` maps optimizer states to dtype names, "same" for the layer's own.

    `scalars`, `replica_scalars` and `digests` are those of the steps that the directory began with; later ones are in records for the
    directory `number`.
    """

    worker: int
    number: int
    places: tuple[Place, ...]
    states: dict[str, str]
    scalars: dict[int, Scalars] = field(default_factory=dict)
    digests: dict[int, ByCopy] = field(default_factory=dict)
    replica_scalars: dict[int, Scalars] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON types only; `from_json` gives back an equal directory."""
        return {
            "worker": self.worker,
            "number": self.number,
            "places": [place.to_json() for place in self.places],
            "states": self.states,
            "scalars": {str(step): values for step, values in self.scalars.items()},
            "digests": {str(step): values for step, values in self.digests.items()},
            "replica_scalars": {str(step): values for step, values in self.replica_scalars.items()},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Directory:
        """The inverse of `to_json`."""
        return cls(
            worker=data["worker"],
            number=data["number"],
            places=tuple(map(Place.from_json, data["places"])),
            states=data["states"],
            scalars={int(step): values for step, values in data["scalars"].items()},
            digests={int(step): values for step, values in data["digests"].items()},
            replica_scalars={int(step): values for step, values in data["replica_scalars"].items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BuffersPlace:
    """Where the packed buffers as of a step lie, their digest, and their CRC-32C."""

    offset: int
    size: int
    digest: str
    checksum: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SumsPlace:
    """Where the gradient sums of a step lie: by vector, of each node `[level, index, offsets]`, with None for absent parameters.

    `leaves` are the losses of the finished grains, as the fields of a `LossLeaf`.
    """

    finished: FinishedGrains
    nodes: Mapping[int, list[Any]]
    leaves: list[Any]

    def to_json(self) -> dict[str, Any]:
        """JSON types only; `from_json` gives back an equal value."""
        return {
            "finished": self.finished.to_json(),
            "nodes": [[number, nodes] for number, nodes in self.nodes.items()],
            "leaves": self.leaves,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SumsPlace:
        """The inverse of `to_json`."""
        finished = FinishedGrains.from_json(data["finished"])
        return cls(finished=finished, nodes=dict(data["nodes"]), leaves=data["leaves"])


class Readable(Protocol):
    """A segment that can be read: `elastic.memory.segment.MappedSegment`."""

    def mark(self, number: int) -> int: ...
    def record(self, record: int, slot: int) -> tuple[int, Any] | None: ...


def _newest(segment: Readable, record: int) -> Any:
    """Returns the newest content of a record; None if there is none."""
    found = [each for slot in range(SLOTS) if (each := segment.record(record, slot)) is not None]
    return max(found, key=lambda each: each[0])[1] if found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The complete copies in a segment: the steps of owned shards, replicas, and previous copies of both (NONE where they are incomplete),
    and the directory.

    `scalars`, `digests` and `buffers` are by step; some copies have no digest. `loop` is the newest record of that name.
    """

    directory: Directory
    live: int
    previous: int
    scalars: Mapping[int, Scalars]
    digests: Mapping[int, ByCopy]
    buffers: Mapping[int, BuffersPlace] = field(default_factory=dict)
    sums: SumsPlace | None = None
    loop: Inventory | None = None
    replica: int = NONE
    previous_replica: int = NONE
    replica_scalars: Mapping[int, Scalars] = field(default_factory=dict)

    @classmethod
    def read(cls, segment: Readable, *, loop: bool = True) -> Contents | None:
        """Reads what a segment says, without `loop` only what its copies need; None if it says nothing yet."""
        found = [(slot, each) for slot in range(SLOTS) if (each := segment.record(DIRECTORY, slot)) is not None]
        if not found:
            return None
        slot, (_, data) = max(found, key=lambda each: each[1][0])
        directory = Directory.from_json(data)
        live, previous = segment.mark(live_mark(slot)), segment.mark(previous_mark(slot))
        replica, previous_replica = segment.mark(replica_mark(slot)), segment.mark(previous_replica_mark(slot))
        scalars, digests, replica_scalars = dict(directory.scalars), dict(directory.digests), dict(directory.replica_scalars)
        own = [(step, number, into) for step in (live, previous) for number, into in ((SCALARS, scalars), (DIGESTS, digests))]
        kept = [
            (step, number, into)
            for step in (replica, previous_replica)
            for number, into in ((REPLICA_SCALARS, replica_scalars), (DIGESTS, digests))
        ]
        for step, number, into in (*own, *kept):
            if step != NONE:
                later = segment.record(number, slot_of(step))
                if later is not None and later[0] == number_of(step) and later[1]["directory"] == directory.number:
                    into[step] = later[1]["values"]
        buffers = {
            number - number_of(0): BuffersPlace(**each)
            for slot in range(SLOTS)
            for number, each in [segment.record(BUFFERS, slot) or (0, None)]
            if each is not None
        }
        told, sums = _newest(segment, LOOP) if loop else None, _newest(segment, SUMS)
        return cls(
            directory=directory,
            live=live,
            previous=previous,
            scalars=scalars,
            digests=digests,
            buffers=buffers,
            sums=None if sums is None else SumsPlace.from_json(sums),
            loop=None if told is None else Inventory.from_json(told),
            replica=replica,
            previous_replica=previous_replica,
            replica_scalars=replica_scalars,
        )

    def step_of(self, place: Place) -> int:
        """Returns the step of a copy; NONE if it is incomplete, or is no copy of its own (gathered parameters)."""
        if place.step is not None:
            return place.step if place.step in self.scalars else NONE
        own = {"live": self.live, "previous": self.previous}.get(place.role, NONE)
        others = {"replica": self.replica, "previous replica": self.previous_replica}.get(place.role, NONE)
        return own if own in self.scalars else others if others in self.replica_scalars else NONE

    @property
    def complete(self) -> list[Place]:
        """The complete copies of all states."""
        return [place for place in self.directory.places if place.role != "gathered" and self.step_of(place) != NONE]

    def digests_of(self, place: Place) -> Mapping[str, str] | None:
        """Returns the digests of a complete copy's states; None if one is unknown."""
        known = self.digests.get(self.step_of(place), {}).get(f"{place.layer}:{place.start}", {})
        return known if known.keys() >= place.states.keys() else None

    def offered(self, places: Collection[Place], *, sums: bool) -> Inventory:
        """Returns the dead worker's inventory, with these of its copies, and with its gradient sums if `sums` is true."""
        steps = {self.step_of(place) for place in places}
        return replace(
            self.loop or Inventory(worker=self.directory.worker, yielded=-1, copies=()),
            buffers={step: place.digest for step, place in self.buffers.items()},
            copies=tuple(
                Copy(layer=place.layer, start=place.start, stop=place.stop, step=self.step_of(place), role=place.role) for place in places
            ),
            states=self.directory.states if places else {},
            scalars={step: {**self.replica_scalars.get(step, {}), **self.scalars.get(step, {})} for step in steps},
            finished=(self.sums.finished,) if sums and self.sums is not None else (),
        )


def _fits(contents: Contents, place: Place, step: int, state: str) -> bool:
    if place.role == "gathered":
        return state == PARAM and place.step in (None, step)
    return contents.step_of(place) == step


@dataclass(frozen=True, slots=True)
class Run:
    """A run of a state in a segment: its elements, and the offset of its first byte; None where its optimizer has not made this state."""

    start: int
    stop: int
    offset: int | None


def runs(contents: Contents, step: int, state: str, layer: int, start: int, stop: int) -> list[Run]:
    """Returns the ascending disjoint runs of `[start, stop)` of a state that a segment has at a step.

    Gathered parameters are taken to be of that step: ask for them only where the worker's own inventory says so.
    """
    fitting = [place for place in contents.directory.places if place.layer == layer and _fits(contents, place, step, state)]
    found: list[Run] = []
    position = start
    while position < stop:
        covering = [place for place in fitting if place.start <= position < place.stop]
        if not covering:
            position = min([stop, *(place.start for place in fitting if place.start > position)])
            continue
        best = max(covering, key=lambda place: (place.role != "gathered", place.stop))
        end = min(stop, best.stop)
        offset, itemsize = best.states.get(state, (None, 0))
        found.append(Run(position, end, None if offset is None else offset + (position - best.start) * itemsize))
        position = end
    return found
