"""Runs a conversion: opens the source, applies rules, writes the target, and verifies that it equals the source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from elastic.checkpoint.convert.compare import compare
from elastic.checkpoint.convert.detect import Detected, detect
from elastic.checkpoint.convert.formats import TARGETS, format_of, kept, open_source, write_target
from elastic.checkpoint.convert.hf import CONFIGS, tied_by_config
from elastic.checkpoint.convert.hf_weights import METADATA
from elastic.checkpoint.convert.main_values import with_main_values
from elastic.checkpoint.convert.output import ConversionProgress, refuse_existing, run_bytes, silent
from elastic.checkpoint.convert.rule_source import Ruled
from elastic.checkpoint.convert.rules import Rules
from elastic.checkpoint.convert.slice_rules import slicings_of
from elastic.checkpoint.convert.tree import SPELLING
from elastic.checkpoint.objects import Location
from elastic.checkpoint.slices import Slicing
from elastic.checkpoint.state import PARAM, Contents, Source, Spec
from elastic.errors import CheckpointError

DEFAULT_MEMORY = 2 << 30
LEAST_MEMORY = 1 << 20
"""Bytes: the smallest `max_memory` of a conversion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """A request to convert a checkpoint. `max_memory`: most bytes of values in memory at a time.

    `tensor_parallel`: the number of ranks whose slices the target keeps, by the rules for slices; 1: everything whole.
    """

    source: Location
    target: Location
    to: str
    max_memory: int = DEFAULT_MEMORY
    rules: Rules = field(default_factory=Rules)
    trust_pickle: bool = False
    verify: bool = True
    tensor_parallel: int | None = None

    def __post_init__(self) -> None:
        if self.to not in TARGETS:
            raise CheckpointError(f"there is no target format {self.to!r}; the targets are {', '.join(TARGETS)}")
        if self.max_memory < LEAST_MEMORY:
            raise CheckpointError(f"max_memory is {self.max_memory} bytes; it must be at least {LEAST_MEMORY}")
        if isinstance(self.target, str) and self.to != "elastic":
            raise CheckpointError(
                f"{self.target}: only the format elastic can be written to URLs; write {self.to} to a directory and copy it"
            )
        self._check_slices()

    def _check_slices(self) -> None:
        ranks, slices = self.tensor_parallel, format_of(self.to).slices
        if ranks is not None and ranks < 1:
            raise CheckpointError(f"tensor_parallel is {ranks}; it must be a positive number of ranks")
        if ranks is not None and ranks > 1 and not slices:
            raise CheckpointError(f"{self.to} cannot hold tensor-parallel slices; tensor_parallel is for the format elastic")
        if ranks is not None and ranks > 1 and not self.rules.slices:
            raise CheckpointError(f"tensor_parallel is {ranks}, but no rule states which tensors are sliced, and how: add [[slice]] rules")
        if ranks is None and slices and self.rules.slices:
            raise CheckpointError("there are rules for slices, but no number of ranks: set tensor_parallel (1 keeps everything whole)")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorToWrite:
    """One tensor to write."""

    name: str
    state: str
    spec: Spec

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return self.spec.bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """A summary of a conversion: tensors to write, values that the target cannot hold, and values that were not read (both in words)."""

    detected: Detected
    tensors: tuple[TensorToWrite, ...]
    left_out: tuple[str, ...]
    unread: tuple[str, ...] = ()
    slicings: Mapping[tuple[str, str], Slicing] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of values."""
        return sum(tensor.size for tensor in self.tensors)


def _left_out(contents: Contents, to: str) -> tuple[str, ...]:
    if not format_of(to).weights_only:
        return ()
    states = sum(len(set(states) - {PARAM}) for states in contents.tensors.values())
    keys = [key for key in contents.extra if key not in (*CONFIGS, SPELLING, METADATA)]
    facts = [(states, f"{states} tensors of optimizer state"), (len(contents.groups), f"{len(contents.groups)} optimizer groups")]
    facts.append((len(keys), f"extra values {', '.join(keys)}"))
    return tuple(text for count, text in facts if count)


def outline(contents: Contents, detected: Detected, request: Conversion) -> Outline:
    """Returns what would be written. Raises CheckpointError if that is nothing, or if rules for slices do not fit."""
    to = request.to
    planned = tuple(
        TensorToWrite(name=name, state=state, spec=spec)
        for name, states in contents.tensors.items()
        for state, spec in states.items()
        if kept(to, state)
    )
    if not planned:
        raise CheckpointError(f"the source has no tensor that {to} can hold")
    slicings = slicings_of(contents, request.rules.slices, request.tensor_parallel or 1)
    return Outline(detected=detected, tensors=planned, left_out=_left_out(contents, to), unread=unread_of(contents), slicings=slicings)


def unread_of(contents: Contents) -> tuple[str, ...]:
    """Returns what was not read of a checkpoint, in words."""
    nested = [(key, value.get("not_read")) for key, value in contents.extra.items() if isinstance(value, Mapping)]
    listed = [("", contents.extra.get("not_read")), *nested]
    return (*contents.unread, *(f"{where}{name}" for where, names in listed if isinstance(names, list) for name in names))


def open_any(path: Location, *, trust_pickle: bool = False, rules: Rules | None = None, lenient: bool = False) -> tuple[Detected, Source]:
    """Detects the format, opens the source, applies rules. Raises CheckpointError; lenient: lists the unreadable in `Contents.unread`."""
    detected, rules = detect(path), replace(rules or Rules(), lenient=lenient)
    source = open_source(path, detected.name, trust_pickle=trust_pickle, rules=rules)
    if not rules.changes:
        return detected, source
    try:
        return detected, Ruled(source, rules)
    except CheckpointError:
        source.close()
        raise


def plan(request: Conversion) -> Outline:
    """Returns what `convert` would write, without writing."""
    detected, source = open_any(request.source, trust_pickle=request.trust_pickle, rules=request.rules)
    source = with_main_values(source, request.to)
    try:
        return outline(source.contents, detected, request)
    finally:
        source.close()


def convert(
    request: Conversion,
    *,
    progress: ConversionProgress = silent,
    checking: ConversionProgress = silent,
    on_plan: Callable[[Outline], None] | None = None,
) -> Outline:
    """Converts, then reads source and target and compares every bit. Raises CheckpointError.

    progress: called as bytes are written. checking: called as tensors are compared. on_plan: called once before anything is written.
    """
    if isinstance(request.target, Path) and request.to != "elastic":
        refuse_existing(request.target)
    detected, source = open_any(request.source, trust_pickle=request.trust_pickle, rules=request.rules)
    source = with_main_values(source, request.to)
    try:
        planned = outline(source.contents, detected, request)
        if on_plan is not None:
            on_plan(planned)
        write_target(source, request.target, request.to, max_memory=request.max_memory, progress=progress, slicings=planned.slicings)
        if request.verify:
            _verify(source, request, checking)
    finally:
        source.close()
    return planned


def _verify(source: Source, request: Conversion, checking: ConversionProgress) -> None:
    written = open_source(request.target, request.to)
    try:
        weights_only = format_of(request.to).weights_only
        for found in compare(source, written, limit=run_bytes(request.max_memory), weights_only=weights_only):
            if not found.equal and not _is_expected(found.what, found.how, source.contents, weights_only):
                raise CheckpointError(f"{request.target} differs from {request.source} after the conversion: {found.what}: {found.how}")
            checking(found.what, 0)
    finally:
        written.close()


def _is_expected(what: str, how: str, contents: Contents, weights_only: bool) -> bool:
    """Returns whether a difference is expected: a tied name that the target's configuration restores, or a step that the source lacks."""
    left = weights_only and what in tied_by_config(contents) and how == "only in the first"
    return left or (what == "step" and contents.step is None)
