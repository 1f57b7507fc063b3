"""Which file holds which tensor at which byte: a pure function of shapes, the same on every worker.

A weight is one contiguous tensor of one safetensors file, whoever writes its runs, so that other programs can open the file.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from checkpoint.files import encode_header, itemsize, layout_entries
from checkpoint.state import PARAM, Contents, Spec
from checkpoint.strict_json import dumps
from elastic.errors import CheckpointError

INDEX = "model.safetensors.index.json"
DEFAULT_FILE_BYTES = 4 << 30
_METADATA = {"format": "pt"}

_BESIDE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,180}\.(json|txt|model|jinja|tiktoken)")
_OURS = ("manifest.json", INDEX)

Key = tuple[str, str]
"""Name of a parameter or buffer, and name of the state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a tensor's first byte lies."""

    file: str
    offset: int
    spec: Spec

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return itemsize(self.spec.dtype)

    @property
    def elements(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.spec.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFile:
    """A file of `size` bytes, of which the first are known beforehand (all of them, for an index)."""

    name: str
    size: int
    head: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePlan:
    """All files but the manifest."""

    contents: Contents
    files: tuple[PlannedFile, ...]
    places: Mapping[Key, Place]

    @property
    def fingerprint(self) -> str:
        """Equal on two workers if and only if they would put everything at the same places."""
        text = b"".join(b"%s %d %d\n%s\n" % (file.name.encode(), file.size, len(file.head), file.head) for file in self.files)
        return hashlib.sha256(text).hexdigest()

    def runs(self) -> Iterator[tuple[str, str, int]]:
        """`(name, state, elements)` of every tensor, in the order of the files."""
        for (name, state), place in self.places.items():
            yield name, state, place.elements


def stored_name(name: str, state: str) -> str:
    """What a tensor is called in its file: weights as in the model, optimizer state `exp_avg` of `w` is `w/exp_avg`."""
    return name if state == PARAM else f"{name}/{state}"


def plan_files(contents: Contents, max_file_bytes: int = DEFAULT_FILE_BYTES) -> FilePlan:
    """Files of at most this many bytes of tensors, unless one tensor alone has more.

    Raises CheckpointError if a dtype or a name cannot be stored.
    """
    if max_file_bytes < 1:
        raise CheckpointError(f"max_file_bytes is {max_file_bytes}; it must be positive")
    _check_names(contents)
    keys = [(name, state) for name, states in contents.tensors.items() for state in states]
    places: dict[Key, Place] = {}
    files: list[PlannedFile] = []
    for kind, chosen in (("model", [k for k in keys if k[1] == PARAM]), ("optimizer", [k for k in keys if k[1] != PARAM])):
        shards = _shards(contents, chosen, max_file_bytes)
        for number, shard in enumerate(shards, 1):
            files.append(_plan_file(contents, f"{kind}-{number:05d}-of-{len(shards):05d}.safetensors", shard, places))
    weights = {name: place.file for (name, state), place in places.items() if state == PARAM}
    total = sum(place.elements * place.itemsize for (_, state), place in places.items() if state == PARAM)
    index = dumps({"metadata": {"total_size": total}, "weight_map": weights}, INDEX)
    files.append(PlannedFile(name=INDEX, size=len(index), head=index))
    files += [PlannedFile(name=name, size=len(data), head=data) for name, data in contents.files.items()]
    return FilePlan(contents=contents, files=tuple(files), places=places)


def lies_beside(name: str) -> bool:
    """Whether a file of this name may lie beside the weights: one of those that models and tokenizers bring, and none of ours."""
    return _BESIDE.fullmatch(name) is not None and name not in _OURS


def _check_names(contents: Contents) -> None:
    for name in contents.files:
        if not lies_beside(name):
            raise CheckpointError(f"a file beside the weights cannot be called {name!r}: use letters, digits and .json, .txt or .model")
    for name, states in contents.tensors.items():
        if not name or name == "__metadata__":
            raise CheckpointError(f"a tensor cannot be called {name!r}")
        for state in states:
            if not state or "/" in state:
                raise CheckpointError(f"tensor {name!r}: a state cannot be called {state!r}")
    for tied, base in contents.ties.items():
        if base not in contents.tensors or tied in contents.tensors:
            raise CheckpointError(f"{tied!r} is tied to {base!r}: the base must be stored and the other must not")


def _bytes(contents: Contents, key: Key) -> int:
    spec = contents.tensors[key[0]][key[1]]
    return math.prod(spec.shape) * itemsize(spec.dtype)


def _shards(contents: Contents, keys: Sequence[Key], most: int) -> list[list[Key]]:
    sizes = [_bytes(contents, key) for key in keys]
    shards: list[list[Key]] = []
    room = 0
    for key, size in zip(keys, sizes, strict=True):
        if not shards or size > room:
            shards.append([])
            room = most
        shards[-1].append(key)
        room -= size
    return shards


def _plan_file(contents: Contents, name: str, keys: Sequence[Key], places: dict[Key, Place]) -> PlannedFile:
    """Wide elements come first, so that every tensor is aligned to its elements, as safetensors' own writer does."""
    ordered = sorted(keys, key=lambda key: -itemsize(contents.tensors[key[0]][key[1]].dtype))
    specs = [contents.tensors[parameter][state] for parameter, state in ordered]
    entries = layout_entries((stored_name(*key), spec.dtype, spec.shape) for key, spec in zip(ordered, specs, strict=True))
    if len({entry.name for entry in entries}) < len(entries):
        names = sorted(entry.name for entry in entries)
        raise CheckpointError(f"two tensors would be called {next(a for a, b in pairwise(names) if a == b)!r}")
    head = encode_header(entries, _METADATA, name)
    for key, spec, entry in zip(ordered, specs, entries, strict=True):
        places[key] = Place(file=name, offset=len(head) + entry.start, spec=spec)
    return PlannedFile(name=name, size=len(head) + (entries[-1].stop if entries else 0), head=head)
