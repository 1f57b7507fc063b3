"""Registered objects: the user's own objects that loop bodies change, such as a counter for early stopping; sent to joiners and saved.

A body that has ended does not run again on the same worker, so these objects are never reset there. A joiner takes their states from after
the newest body that has ended on all other workers, and runs everything after that body itself. So states are noted when a body ends, not
when they are requested: code between two loops may have changed the objects by then.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from elastic.engine.streaming import Position
from elastic.errors import TrainerError
from elastic.recovery.proposal import Proposal
from elastic.worker.plain_state import capture, from_plain, revive, to_plain

if TYPE_CHECKING:
    from elastic.worker.fallback import Restored

LARGEST = 256 * 1024
"""Characters of JSON that all registered states may have together: they are sent in each recovery."""

_SHOWN = 60

ObjectStates = list[list[Any]]
"""`[[type's name, state as JSON], ...]`, in the order in which objects were registered."""


class Registered:
    """One worker's registered objects. `states` were noted at the end of the loop body of `step`."""

    def __init__(self) -> None:
        self.step = -1
        self.states: ObjectStates | None = None
        self._objects: list[Any] = []
        self._pending = False  # the states came from other workers or a checkpoint, and the next loop has not begun
        self._origin = ""

    def add(self, objects: tuple[Any, ...], model: nn.Module) -> None:
        """Registers objects. Raises TrainerError for one that cannot be stored."""
        for given in objects:
            _check(given, model)
            if any(given is known for known in self._objects):
                raise TrainerError(f"a {_kind(given)} is given to register_for_checkpointing twice: register it once")
            self._objects.append(given)
        self.read()
        if self._pending:
            self._load(len(self._objects) - len(objects))

    def begin(self, *, warns: bool) -> None:
        """Begins a loop: loads states into the objects if the body before it ran elsewhere."""
        if self._pending:
            self._pending = False
            known, own = [kind for kind, _ in self.states or []], [_kind(each) for each in self._objects]
            if self._objects and known != own:
                raise TrainerError(
                    f"{self._origin} the states of {_listed(known)}, but register_for_checkpointing was given {_listed(own)} here: give it "
                    "the same objects in the same order, before the loop"
                )
            if known and not own and warns:
                warnings.warn(
                    f"{self._origin} the states of {_listed(known)}, which are not used: give register_for_checkpointing the "
                    "objects that should load them",
                    stacklevel=4,
                )
            self._load(0)

    def _load(self, first: int) -> None:
        for number, (kind, state) in list(enumerate(self.states or []))[first : len(self._objects)]:
            if kind == _kind(self._objects[number]):
                _give(self._objects[number], state)

    def note(self, step: int) -> None:
        """Notes the states at the end of the loop body of `step`."""
        self.step = step
        self.states = self.read() if self._objects else None

    def read(self) -> ObjectStates | None:
        """Returns the present states; None if nothing is registered. Raises TrainerError for a state that cannot be stored."""
        states = [[_kind(each), _state(each)] for each in self._objects]
        size = len(json.dumps(states))
        if size > LARGEST:
            largest = max(states, key=lambda state: len(json.dumps(state)))[0]
            raise TrainerError(
                f"the states given to register_for_checkpointing have {size:,} characters, the largest is that of {largest}; the limit is "
                f"{LARGEST:,}, since they are sent to every worker that joins. Keep counters and small tensors in them; use "
                "average for an average of the parameters, and the state that after_step gets for values of a parameter"
            )
        return states or None

    def learn(self, step: int, states: ObjectStates | None, origin: str) -> None:
        """Takes the states from after the loop body of `step`, which ran elsewhere; `origin` (their source and a verb) begins messages."""
        self.step, self._origin, self.states, self._pending = step, origin, states, states is not None

    def take_over(self, proposal: Proposal, restored: Restored | None, seen: int) -> None:
        """Takes over the states after the loop body of step `seen`, which did not run here."""
        known = next((states for step, states in proposal.objects if step == seen), None)
        if known is None and restored is not None and proposal.resume == seen:
            self.learn(seen, restored.objects, "the checkpoint has")
        else:
            self.learn(seen, known, "the other workers have")

    @property
    def told(self) -> list[Any] | None:
        """The message for a worker that joins: `[step, states]`."""
        return None if self.states is None else [self.step, self.states]

    @property
    def digest(self) -> str:
        """The digest of the states after the newest body, to be compared between workers."""
        return digest_of(self.states)

    @property
    def named(self) -> list[Any]:
        """The states as `[[name, value as text], ...]`, to be compared between workers."""
        states = self.states or []
        found = [["the list of objects given to register_for_checkpointing", _listed([kind for kind, _ in states])]]
        for number, (kind, state) in enumerate(states):
            whose = kind if [other for other, _ in states].count(kind) == 1 else f"{kind} (number {number + 1} of those registered)"
            values = from_plain(_compared(kind, state))
            pairs = values.items() if isinstance(values, dict) else [("the state", values)]
            found += [[f"{key} of {whose}", _text(value)] for key, value in pairs]
        return found


def digest_of(states: ObjectStates | None) -> str:
    """Returns a digest of the states; empty if nothing is registered."""
    if states is None:
        return ""
    compared = [[kind, _compared(kind, state)] for kind, state in states]
    return hashlib.blake2b(json.dumps(compared).encode(), digest_size=16).hexdigest()


def _compared(kind: str, state: Any) -> Any:
    """Returns what must be equal on all workers: of a place in data not the state, which depends on where reading began."""
    return {"dict": [pair for pair in state["dict"] if pair[0] != "state"]} if kind == Position.__name__ else state


def _kind(given: Any) -> str:
    return type(given).__name__


def _listed(kinds: list[str]) -> str:
    return ", ".join(kinds) or "nothing"


def _text(value: Any) -> str:
    text = json.dumps(to_plain(value))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({hashlib.blake2b(text.encode(), digest_size=4).hexdigest()})"


def _check(given: Any, model: nn.Module) -> None:
    name = _kind(given)
    if isinstance(given, Optimizer) or any(given is module for module in model.modules()):
        raise TrainerError(f"a {name} of the Trainer is given to register_for_checkpointing: it is sent and saved anyway; leave it out")
    if not callable(getattr(given, "state_dict", None)) or not callable(getattr(given, "load_state_dict", None)):
        raise TrainerError(
            f"register_for_checkpointing is given a {name}, which has no state_dict() and load_state_dict(): make a small class with both "
            "that holds the loop's counters"
        )
    before = _state(given)
    try:
        _give(given, json.loads(json.dumps(before)))
        after = _state(given)
    except TrainerError:
        raise
    except Exception as error:  # a user's object may raise anything
        raise TrainerError(
            f"{name} cannot be registered: its load_state_dict() refuses what its state_dict() returned ({type(error).__name__}: {error})"
        ) from error
    if json.dumps(before) != json.dumps(after):
        raise TrainerError(f"{name} cannot be registered: its load_state_dict() does not restore what its state_dict() returned")


def _give(given: Any, state: Any) -> None:
    given.load_state_dict(revive(from_plain(state), given.state_dict()))


def _state(given: Any) -> Any:
    state = given.state_dict()
    try:
        return to_plain(capture(state))
    except TypeError as error:
        key = next((f" {key!r}" for key, value in state.items() if _refused(value)), "") if isinstance(state, dict) else ""
        raise TrainerError(
            f"the state{key} of {_kind(given)} cannot be registered: {error}. Let state_dict() return numbers, strings, lists, dicts with "
            "strings as keys, and small tensors or arrays"
        ) from error


def _refused(value: Any) -> bool:
    try:
        to_plain(capture(value))
    except TypeError:
        return True
    return False
