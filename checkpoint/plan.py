"""Plans which file holds which tensor at which byte: a pure function of shapes, the same on every worker.

A weight is one contiguous tensor of one safetensors file, even if several workers write its runs, so that other programs can open the
file. If a weight is kept as tensor-parallel slices, each slice is one contiguous tensor, in a file with its rank in its name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

from elastic.checkpoint.files import encode_header, layout_entries
from elastic.checkpoint.slices import Slicing
from elastic.checkpoint.state import PARAM, Contents, Spec
from elastic.checkpoint.strict_json import dumps
from elastic.errors import CheckpointError

INDEX = "model.safetensors.index.json"
DEFAULT_FILE_BYTES = 4 << 30
_METADATA = {"format": "pt"}

_BESIDE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,180}\.(json|txt|model|jinja|tiktoken)")
_OURS = re.compile(r"manifest\.json|model(-tp\d+)?\.safetensors\.index\.json")

TensorKey = tuple[str, str]
"""The name of a parameter or buffer, and the name of the state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlace:
    """The place of a tensor: its file, and the offset of its first byte."""

    file: str
    offset: int
    spec: Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Sliced:
    """The places of a tensor's slices, by rank. `spec` is that of the whole tensor."""

    spec: Spec
    slicing: Slicing
    slices: tuple[TensorPlace, ...]


StoredTensor = TensorPlace | Sliced


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFile:
    """A file of `size` bytes that begins with `head` (for an index, the whole file). `zeros`: byte ranges of padding."""

    name: str
    size: int
    head: bytes
    zeros: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePlan:
    """All files of a checkpoint, except the manifest."""

    contents: Contents
    files: tuple[PlannedFile, ...]
    places: Mapping[TensorKey, StoredTensor]

    @property
    def fingerprint(self) -> str:
        """A digest that is equal on two workers if and only if their plans put everything at the same places."""
        text = b"".join(b"%s %d %d\n%s\n" % (file.name.encode(), file.size, len(file.head), file.head) for file in self.files)
        cuts = [f"{key} {place.slicing}\n" for key, place in self.places.items() if isinstance(place, Sliced)]
        return hashlib.sha256(text + "".join(cuts).encode()).hexdigest()

    def runs(self) -> Iterator[tuple[str, str, int]]:
        """Yields `(name, state, elements)` of every tensor, in the order of the files."""
        for (name, state), place in self.places.items():
            yield name, state, place.spec.elements


def stored_name(name: str, state: str) -> str:
    """Returns a tensor's name in its file: a weight's name as in the model; `w/exp_avg` for optimizer state `exp_avg` of `w`."""
    return name if state == PARAM else f"{name}/{state}"


def stored_parts(place: StoredTensor) -> tuple[TensorPlace, ...]:
    """Returns the contiguous tensors in files: the whole tensor, or each rank's slice."""
    return place.slices if isinstance(place, Sliced) else (place,)


def plan_files(
    contents: Contents, max_file_bytes: int = DEFAULT_FILE_BYTES, slicings: Mapping[TensorKey, Slicing] = MappingProxyType({})
) -> FilePlan:
    """Plans files of at most `max_file_bytes` of tensors, unless one tensor or slice has more. `slicings`: of tensors kept as slices.

    Raises CheckpointError if a dtype or a name cannot be stored, or if a slicing does not fit.
    """
    if max_file_bytes < 1:
        raise CheckpointError(f"max_file_bytes is {max_file_bytes}; it must be positive")
    _check_names(contents)
    _check_slicings(contents, slicings)
    specs = {(name, state): spec for name, states in contents.tensors.items() for state, spec in states.items()}
    found: dict[TensorKey, list[TensorPlace]] = {}
    files: list[PlannedFile] = []
    for kind, chosen in (("model", [k for k in specs if k[1] == PARAM]), ("optimizer", [k for k in specs if k[1] != PARAM])):
        files += _plan_kind(kind, {key: specs[key] for key in chosen if key not in slicings}, max_file_bytes, found)
        for rank in range(max((slicings[key].ranks for key in chosen if key in slicings), default=0)):
            own = {key: slicings[key] for key in chosen if key in slicings and rank < slicings[key].ranks}
            parts = {key: Spec(shape=slicing.shape(specs[key].shape, rank), dtype=specs[key].dtype) for key, slicing in own.items()}
            padding = {key: tuple(slicing.padding(specs[key].shape, rank)) for key, slicing in own.items()}
            files += _plan_kind(f"{kind}-tp{rank}", parts, max_file_bytes, found, padding)
    places: dict[TensorKey, StoredTensor] = {
        key: Sliced(spec=specs[key], slicing=slicings[key], slices=tuple(parts)) if key in slicings else parts[0]
        for key, parts in found.items()
    }
    files += [_plan_index(name, weights) for name, weights in index_tables(places).items()]
    files += [PlannedFile(name=name, size=len(data), head=data) for name, data in contents.files.items()]
    return FilePlan(contents=contents, files=tuple(files), places=places)


def index_tables(places: Mapping[TensorKey, StoredTensor]) -> dict[str, dict[str, TensorPlace]]:
    """Returns the indices of weights by file name: one of all weights, as Hugging Face writes it; with slices, one for each rank."""
    weights = {name: place for (name, state), place in places.items() if state == PARAM}
    ranks = max((place.slicing.ranks for place in weights.values() if isinstance(place, Sliced)), default=0)
    tables: dict[str, dict[str, TensorPlace]] = {f"model-tp{rank}.safetensors.index.json": {} for rank in range(ranks)} or {INDEX: {}}
    for rank, table in enumerate(tables.values()):
        for name, place in weights.items():
            if isinstance(place, TensorPlace):
                table[name] = place
            elif rank < place.slicing.ranks:
                table[name] = place.slices[rank]
    return tables


def _plan_index(name: str, weights: Mapping[str, TensorPlace]) -> PlannedFile:
    total = sum(place.spec.bytes for place in weights.values())
    index = dumps({"metadata": {"total_size": total}, "weight_map": {key: place.file for key, place in weights.items()}}, name)
    return PlannedFile(name=name, size=len(index), head=index)


def _check_slicings(contents: Contents, slicings: Mapping[TensorKey, Slicing]) -> None:
    for (name, state), slicing in slicings.items():
        spec = contents.tensors.get(name, {}).get(state)
        if spec is None:
            raise CheckpointError(f"{name!r}, {state!r} is to be kept as slices, but there is no such tensor")
        try:
            slicing.check(spec.shape)
        except CheckpointError as error:
            raise CheckpointError(f"{name!r}, {state!r}: {error}") from error


def is_extra_file(name: str) -> bool:
    """Returns whether a file of this name may accompany the weights: a model's or a tokenizer's file, none of this format."""
    return _BESIDE.fullmatch(name) is not None and _OURS.fullmatch(name) is None


def _check_names(contents: Contents) -> None:
    for name in contents.files:
        if not is_extra_file(name):
            raise CheckpointError(f"an extra file cannot be called {name!r}: use letters, digits, and .json, .txt or .model at the end")
    for name, states in contents.tensors.items():
        if not name or name == "__metadata__":
            raise CheckpointError(f"a tensor cannot be called {name!r}")
        for state in states:
            if not state or "/" in state:
                raise CheckpointError(f"tensor {name!r}: a state cannot be called {state!r}")
    for tied, base in contents.ties.items():
        if base not in contents.tensors or tied in contents.tensors:
            raise CheckpointError(f"{tied!r} is tied to {base!r}: {base!r} must be stored, and {tied!r} must not")


def _plan_kind(
    kind: str,
    specs: Mapping[TensorKey, Spec],
    most: int,
    found: dict[TensorKey, list[TensorPlace]],
    padding: Mapping[TensorKey, Sequence[tuple[int, int]]] = MappingProxyType({}),
) -> list[PlannedFile]:
    """Plans the files of one kind, or of one rank's slices, and adds each key's place to `found`. `padding`: runs in elements."""
    shards = _shards(specs, most)
    files: list[PlannedFile] = []
    for number, shard in enumerate(shards, 1):
        name = f"{kind}-{number:05d}-of-{len(shards):05d}.safetensors"
        head, places = _plan_file(name, {key: specs[key] for key in shard})
        zeros = [_byte_range(place, run) for key, place in places.items() for run in padding.get(key, ())]
        for key, place in places.items():
            found.setdefault(key, []).append(place)
        size = len(head) + sum(place.spec.bytes for place in places.values())
        files.append(PlannedFile(name=name, size=size, head=head, zeros=tuple(zeros)))
    return files


def _byte_range(place: TensorPlace, run: tuple[int, int]) -> tuple[int, int]:
    return place.offset + run[0] * place.spec.itemsize, place.offset + run[1] * place.spec.itemsize


def _shards(specs: Mapping[TensorKey, Spec], most: int) -> list[list[TensorKey]]:
    shards: list[list[TensorKey]] = []
    room = 0
    for key, spec in specs.items():
        size = spec.bytes
        if not shards or size > room:
            shards.append([])
            room = most
        shards[-1].append(key)
        room -= size
    return shards


def _plan_file(name: str, specs: Mapping[TensorKey, Spec]) -> tuple[bytes, dict[TensorKey, TensorPlace]]:
    """Returns header and places. Wide elements come first, as in safetensors' own writer, so every tensor is aligned to its elements."""
    ordered = sorted(specs, key=lambda key: -specs[key].itemsize)
    entries = layout_entries((stored_name(*key), specs[key].dtype, specs[key].shape) for key in ordered)
    if len({entry.name for entry in entries}) < len(entries):
        names = sorted(entry.name for entry in entries)
        raise CheckpointError(f"two tensors would be called {next(a for a, b in pairwise(names) if a == b)!r}")
    head = encode_header(entries, _METADATA, name)
    return head, {
        key: TensorPlace(file=name, offset=len(head) + entry.start, spec=specs[key]) for key, entry in zip(ordered, entries, strict=True)
    }
