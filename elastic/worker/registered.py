"""Objects of the user's own that loop bodies change, such as a counter for early stopping: what joiners and checkpoints get of them.

A body that is over does not run again on a worker that has seen it, so these objects are never put back there. Whoever joins takes their
states as they are behind the newest body that is over on all others, and runs everything behind that body itself. So states are noted where
a body ends, and not when somebody asks for them: code between two loops may have changed the objects by then.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from typing import Any

from torch import nn
from torch.optim import Optimizer

from elastic.errors import TrainerError
from elastic.worker.plain import capture, from_plain, revive, to_plain

LARGEST = 256 * 1024
"""Characters of JSON that all registered states may have together: they travel with each recovery."""

_SHOWN = 60

ObjectStates = list[list[Any]]
"""`[[type's name, state as JSON], ...]`, in the order in which objects were registered."""


class Registered:
    """The objects of one worker. `step` is the one behind whose loop body `states` were noted."""

    def __init__(self) -> None:
        self.step = -1
        self.states: ObjectStates | None = None
        self._objects: list[Any] = []
        self._pending = False  # the states are of others, or of a checkpoint, and the loop that goes on from them has not begun
        self._origin = ""

    def add(self, objects: tuple[Any, ...], model: nn.Module) -> None:
        """Registers them. Raises TrainerError for what cannot be kept."""
        for given in objects:
            _check(given, model)
            if any(given is known for known in self._objects):
                raise TrainerError(f"a {_kind(given)} is given to register_for_checkpointing twice: once is enough")
            self._objects.append(given)
        self.read()
        if self._pending:
            self._load(len(self._objects) - len(objects))

    def begin(self, *, warns: bool) -> None:
        """A loop begins that this worker takes part in: objects are as they were behind the body before it, where that ran elsewhere."""
        if self._pending:
            self._pending = False
            known, own = [kind for kind, _ in self.states or []], [_kind(each) for each in self._objects]
            if self._objects and known != own:
                raise TrainerError(
                    f"{self._origin} the states of {_listed(known)}, and register_for_checkpointing was given {_listed(own)} here: give it "
                    "the same objects in the same order, before the loop"
                )
            if known and not own and warns:
                warnings.warn(
                    f"{self._origin} the states of {_listed(known)}, which nobody asks for: give trainer.register_for_checkpointing the "
                    "objects that go on from them",
                    stacklevel=4,
                )
            self._load(0)

    def _load(self, first: int) -> None:
        for number, (kind, state) in list(enumerate(self.states or []))[first : len(self._objects)]:
            if kind == _kind(self._objects[number]):
                _give(self._objects[number], state)

    def note(self, step: int) -> None:
        """The loop body of `step` is over here."""
        self.step = step
        self.states = self.read() if self._objects else None

    def read(self) -> ObjectStates | None:
        """The states as they are now; None if nothing is registered. Raises TrainerError for what cannot be kept."""
        states = [[_kind(each), _state(each)] for each in self._objects]
        size = len(json.dumps(states))
        if size > LARGEST:
            largest = max(states, key=lambda state: len(json.dumps(state)))[0]
            raise TrainerError(
                f"the states given to register_for_checkpointing are {size:,} characters long, those of {largest} most of it, and may be "
                f"{LARGEST:,}: they go to every worker that joins. Keep counters and small tensors in them; an average of the parameters "
                "is trainer.average, what belongs to a parameter is the state of trainer.after_step"
            )
        return states or None

    def learn(self, step: int, states: ObjectStates | None, origin: str) -> None:
        """This worker goes on behind the loop body of `step`, which ran elsewhere; `origin` says who knows these states, and `has` them."""
        self.step, self._origin, self.states, self._pending = step, origin, states, states is not None

    @property
    def told(self) -> list[Any] | None:
        """What a worker that joins needs: `[step, states]`."""
        return None if self.states is None else [self.step, self.states]

    @property
    def digest(self) -> str:
        """Of the states behind the newest body; equal on all workers where these are."""
        return digest_of(self.states)

    @property
    def named(self) -> list[Any]:
        """The states as `[[what it is, value as text], ...]`, as others can compare them."""
        states = self.states or []
        found = [["what register_for_checkpointing was given", _listed([kind for kind, _ in states])]]
        for number, (kind, state) in enumerate(states):
            whose = kind if [other for other, _ in states].count(kind) == 1 else f"{kind} (number {number + 1} of those registered)"
            values = from_plain(state)
            pairs = values.items() if isinstance(values, dict) else [("the state", values)]
            found += [[f"{key} of {whose}", _text(value)] for key, value in pairs]
        return found


def digest_of(states: ObjectStates | None) -> str:
    """Equal for equal states; empty where nothing is registered."""
    return "" if states is None else hashlib.blake2b(json.dumps(states).encode(), digest_size=16).hexdigest()


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
        raise TrainerError(f"a {name} of the Trainer is given to register_for_checkpointing: it goes to workers and checkpoints anyway")
    if not callable(getattr(given, "state_dict", None)) or not callable(getattr(given, "load_state_dict", None)):
        raise TrainerError(
            f"register_for_checkpointing is given a {name}, which has no state_dict() and load_state_dict(): make a small class with both "
            "of what the loop counts"
        )
    before = _state(given)
    try:
        _give(given, json.loads(json.dumps(before)))
        after = _state(given)
    except TrainerError:
        raise
    except Exception as error:  # whatever an object of the user's may raise
        raise TrainerError(
            f"{name} cannot be registered: its load_state_dict() does not take what its state_dict() gave ({type(error).__name__}: {error})"
        ) from error
    if json.dumps(before) != json.dumps(after):
        raise TrainerError(f"{name} cannot be registered: its load_state_dict() does not bring back what its state_dict() gave")


def _give(given: Any, state: Any) -> None:
    given.load_state_dict(revive(from_plain(state), given.state_dict()))


def _state(given: Any) -> Any:
    state = given.state_dict()
    try:
        return to_plain(capture(state))
    except TypeError as error:
        key = next((f" {key!r}" for key, value in state.items() if _refused(value)), "") if isinstance(state, dict) else ""
        raise TrainerError(
            f"the state{key} of {_kind(given)} cannot be registered: {error}. Let state_dict() give numbers, strings, lists, dicts with "
            "strings as keys, and small tensors or arrays"
        ) from error


def _refused(value: Any) -> bool:
    try:
        to_plain(capture(value))
    except TypeError:
        return True
    return False
