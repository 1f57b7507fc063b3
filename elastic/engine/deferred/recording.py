"""Notes every operation on tensors of the `meta` device, with the memory that it reads and writes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from elastic.errors import TrainerError
from elastic.memory.tensors import OF_VALUES, copy

_BLANK = ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")
_OVERWRITING = ("normal_", "uniform_", "fill_", "zero_", "copy_", "exponential_", "log_normal_", "cauchy_", "geometric_", "random_")

_ASKS_META = torch.Tensor.is_meta.__get__  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ref:
    """A tensor of the recording: a part of one storage. Shape, strides and offset in elements."""

    storage: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One call. Tensors without memory among its arguments are `Ref`.

    `reads`, `writes`: storages whose contents it needs, and changes. `creates`: each result in a storage of its own, with its number among
    the results. `overwrites`: storages of which it writes every element. `blank`: what it creates has no values yet. `default`: torch's
    default dtype when it was called.
    """

    name: str
    call: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    reads: frozenset[int]
    writes: frozenset[int]
    creates: tuple[tuple[int, Ref], ...]
    overwrites: frozenset[int]
    blank: bool
    random: bool
    default: torch.dtype = field(default_factory=torch.get_default_dtype)


class Tape:
    """The operations in their order. Storages are numbered by their first use."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.constants: list[tuple[torch.Tensor, int]] = []  # real tensors that operations read, and their versions
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []  # storages and tensors: an address of one that is gone could be used again

    def ref(self, tensor: torch.Tensor) -> Ref:
        """Returns the name of a tensor on meta."""
        storage = tensor.untyped_storage()
        number = self._numbers.get(storage._cdata)
        if number is None:
            number = self._numbers[storage._cdata] = len(self._numbers)
            self._alive.append(storage)
        return Ref(
            storage=number,
            shape=tuple(tensor.shape),
            strides=tuple(tensor.stride()),
            offset=int(tensor.storage_offset()),
            dtype=tensor.dtype,
        )

    def note(self, name: str, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], out: Any, written: Any) -> None:
        """Notes a call. `written`: the tensors among its arguments that it changes."""
        given = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
        results = [each for each in tree_flatten(out)[0] if isinstance(each, torch.Tensor)]
        if not any(each.is_meta for each in [*given, *results]):
            return
        refs = {id(each): self.ref(each) for each in given if each.is_meta}
        self.constants += [(each, each._version) for each in given if not each.is_meta]
        before = {ref.storage for ref in refs.values()}
        made = [(number, self.ref(each)) for number, each in enumerate(results) if each.is_meta]
        creates = tuple((number, ref) for number, ref in made if ref.storage not in before)
        changed = [each for each in tree_flatten(written)[0] if isinstance(each, torch.Tensor) and each.is_meta]
        if not creates and not changed:
            return  # a view
        overwriting = name in _OVERWRITING or name.startswith("init.")
        whole = {self.ref(each).storage for each in changed if overwriting and _covers(each)}
        self.operations.append(
            Operation(
                name=name,
                call=call,
                args=tree_map(lambda each: refs.get(id(each), each), tuple(args)),
                kwargs=tree_map(lambda each: refs.get(id(each), each), dict(kwargs)),
                reads=frozenset(before - (whole - self._read_elsewhere(changed, given))),
                writes=frozenset(self.ref(each).storage for each in changed),
                creates=creates,
                overwrites=frozenset(whole),
                blank=name in _BLANK,
                random=_draws(name, call),
            )
        )

    def constant(self, tensor: torch.Tensor) -> Ref:
        """Notes a tensor that has values, such as one of NumPy's, and returns the name of a contiguous copy of it."""
        ref = replace(self.ref(tensor), strides=_row_major(tensor).stride(), offset=0)
        nothing = frozenset[int]()
        self.operations.append(
            Operation(
                name="constant",
                call=_row_major,
                args=(tensor.detach(),),
                kwargs={},
                reads=nothing,
                writes=nothing,
                creates=((0, ref),),
                overwrites=nothing,
                blank=False,
                random=False,
            )
        )
        return ref

    def _read_elsewhere(self, changed: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> set[int]:
        """Returns the storages that a call reads although it changes them, such as that of the source of a copy."""
        own = {id(each) for each in changed}
        return {self.ref(each).storage for each in given if each.is_meta and id(each) not in own}


def _row_major(tensor: torch.Tensor) -> torch.Tensor:
    return copy(tensor.contiguous())


def _covers(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor has every element of its storage."""
    return tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()


def _draws(name: str, call: Any) -> bool:
    return name.startswith("init.") or torch.Tag.nondeterministic_seeded in getattr(call, "tags", ())


def _refuse_generators(where: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    if any(isinstance(each, torch.Generator) for each in tree_flatten((args, dict(kwargs)))[0]):
        raise TrainerError(
            f"the function that builds the model draws with a torch.Generator of its own ({where}): initial values that are computed "
            "later, where they are needed, are keyed by the Trainer's seed=. Leave the generator out, or give the Trainer the model itself"
        )


class _Operations(TorchDispatchMode):
    """Notes what torch computes."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _refuse_generators(str(func), args, kwargs)
        out = func(*args, **kwargs)
        written = [
            kwargs.get(argument.name) if argument.kwarg_only else (args[place] if place < len(args) else None)
            for place, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        self._tape.note(func._schema.name.rpartition("::")[2], func, args, kwargs, out, written)
        return out


class _Functions(TorchFunctionMode):
    """Notes calls that are no operations on meta: values that become tensors, and functions of `torch.nn.init` that skip meta."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in OF_VALUES:
            values = {name: value for name, value in kwargs.items() if name != "device"}
            self._tape.note("maker", func, args, {**values, "device": torch.device("meta")}, out, ())
        elif out is True and func == _ASKS_META:
            self._skipped(args[0], sys._getframe(1))
        return out

    def _skipped(self, tensor: torch.Tensor, frame: Any) -> None:
        """Notes a function of `torch.nn.init` that asks whether its tensor is on meta, since it does nothing then."""
        if frame.f_globals.get("__name__") != "torch.nn.init":
            return
        code = frame.f_code
        given = {name: frame.f_locals[name] for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]}
        if (call := getattr(torch.nn.init, code.co_name, None)) is not None and given.get("tensor") is tensor:
            _refuse_generators(f"nn.init.{code.co_name}", (), given)
            self._tape.note(f"init.{code.co_name}", call, (), given, None, (tensor,))


@contextmanager
def recording(tape: Tape, *, on_meta: bool = True) -> Iterator[None]:
    """Notes on the tape what the block does to tensors on meta. With `on_meta`, new tensors are made there."""
    device = torch.device("meta") if on_meta else torch.device("cpu")
    with device, _Functions(tape), _Operations(tape):
        yield
