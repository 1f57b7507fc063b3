"""An interpreter of pickles that only builds values: it imports nothing, calls only allowed functions, and refuses all other opcodes.

Python's own unpickler, even with a restricted `find_class`, allocates as much memory as a size field or a memo index in the pickle demands.
This one reads opcodes with `pickletools.genops`, which reads only bytes that the pickle holds.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from typing import Any

from elastic.checkpoint.pickles.calls import call, resolve, storage
from elastic.checkpoint.pickles.origin import Origin
from elastic.checkpoint.pickles.values import Global, Opaque

_MARK = object()
_LONG_BITS = 512
_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT")
_TEXTS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING")
_LITERALS = frozenset((*_NUMBERS, *_TEXTS, "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"))
_FRESH: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
    "MARK": lambda: _MARK,
}


def run(origin: Origin, data: bytes) -> Any:
    """Returns the value of a pickle. Raises CheckpointError with the file and the reason."""
    machine = _Machine(origin)
    try:
        for operation, (opcode, argument, position) in enumerate(pickletools.genops(io.BytesIO(data))):
            if operation > origin.limits.operations:
                raise origin.refuse(f"its pickle has more than {origin.limits.operations} operations")
            machine.step(opcode.name, argument, position)
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError, RecursionError, MemoryError) as error:
        raise origin.refuse(f"its pickle is damaged ({type(error).__name__}: {str(error)[:200]})") from error
    if len(machine.stack) != 1 or machine.stack[0] is _MARK:
        raise origin.refuse("its pickle does not end with exactly one value")
    return machine.stack[0]


class _Machine:
    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any, position: int | None) -> None:
        if opcode in _LITERALS:
            if type(argument) is int and argument.bit_length() > _LONG_BITS:
                raise self.origin.refuse("its pickle holds a number of more than 512 bits")
            self.stack.append(argument)
        elif opcode in _FRESH:
            self.stack.append(_FRESH[opcode]())
        elif opcode in _ACTIONS:
            _ACTIONS[opcode](self, argument)
        elif opcode not in ("PROTO", "FRAME", "STOP"):
            raise self.origin.refuse(f"its pickle uses {opcode} at byte {position}, which torch.save never writes")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value must be")
        return value

    def top(self) -> Any:
        value = self.stack[-1]
        if value is _MARK:
            raise ValueError("a mark where a value must be")
        return value

    def marked(self) -> list[Any]:
        """Pops everything above the topmost mark, and the mark; returns the values."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("no mark")
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(values)))

    def extend(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Opaque):
            target.elements.extend(values)
        elif isinstance(target, list):
            target.extend(values)
        else:
            raise ValueError(f"appends to {type(target).__name__}")

    def update(self, values: list[Any]) -> None:
        target = self.top()
        target = target.items if isinstance(target, Opaque) else target
        if not isinstance(target, dict) or len(values) % 2:
            raise ValueError(f"sets items of {type(target).__name__}")
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[_key(key)] = value

    def add(self, values: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, set):
            raise ValueError(f"adds to {type(target).__name__}")
        target.update(_key(value) for value in values)

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Opaque):
            target.state = state
        elif not (isinstance(target, dict) and isinstance(state, dict)):
            raise self.origin.refuse(f"its pickle sets the state of a {type(target).__name__}")

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is not text")
        self.stack.append(resolve(Global(module, name)))

    def reduce(self) -> None:
        args, target = self.pop(), self.pop()
        self.stack.append(call(self.origin, target, args))

    def reduce_with_keywords(self) -> None:
        keywords, args, target = self.pop(), self.pop(), self.pop()
        made = call(self.origin, target, args)
        if keywords and not isinstance(made, Opaque):
            raise self.origin.refuse(f"its pickle gives keywords to {target}")
        self.stack.append(made)

    def put(self, index: int) -> None:
        self.memo[index] = self.top()


def _key(value: Any) -> Any:
    """Returns a key after a check that its hash is not deeply recursive: hashing nested tuples can overflow the C stack."""
    flat = value if isinstance(value, tuple) else (value,)
    if all(one is None or isinstance(one, (str, int, float, bytes, Global, Opaque)) for one in flat):
        return value
    raise ValueError(f"a key of type {type(value).__name__}")


def _frozen_set(machine: _Machine) -> None:
    machine.stack.append(frozenset(_key(value) for value in machine.marked()))


def _dictionary(machine: _Machine) -> None:
    values = machine.marked()
    machine.stack.append({})
    machine.update(values)


def _stack_global(machine: _Machine) -> None:
    name, module = machine.pop(), machine.pop()
    machine.name(module, name)


_ACTIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    "POP": lambda m, _: m.stack.pop(),
    "POP_MARK": lambda m, _: m.marked(),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.marked())),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "LIST": lambda m, _: m.stack.append(m.marked()),
    "APPEND": lambda m, _: m.extend([m.pop()]),
    "APPENDS": lambda m, _: m.extend(m.marked()),
    "DICT": lambda m, _: _dictionary(m),
    "SETITEM": lambda m, _: m.update([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, _: m.update(m.marked()),
    "ADDITEMS": lambda m, _: m.add(m.marked()),
    "FROZENSET": lambda m, _: _frozen_set(m),
    "PUT": lambda m, index: m.put(index),
    "BINPUT": lambda m, index: m.put(index),
    "LONG_BINPUT": lambda m, index: m.put(index),
    "MEMOIZE": lambda m, _: m.put(len(m.memo)),
    "BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "LONG_BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "GLOBAL": lambda m, name: m.name(*name.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: _stack_global(m),
    "REDUCE": lambda m, _: m.reduce(),
    "NEWOBJ": lambda m, _: m.reduce(),
    "NEWOBJ_EX": lambda m, _: m.reduce_with_keywords(),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.stack.append(storage(m.origin, m.pop())),
}
