"""The manifest lists a checkpoint's tensors, their places and the files' digests. It is written last; without a good one there is no
checkpoint.

The file is JSON. Its first line holds the SHA-256 of all bytes after that line, so a reader checks it without a canonical form of JSON.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from elastic.checkpoint.blocks import DIGITS, block_count, file_digest
from elastic.checkpoint.files import CODES
from elastic.checkpoint.plan import FilePlan, Sliced, StoredTensor, TensorKey, TensorPlace
from elastic.checkpoint.slices import Slicing
from elastic.checkpoint.state import Contents, Group, Spec
from elastic.checkpoint.strict_json import dumps, loads, with_special_floats, without_special_floats
from elastic.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = "elastic-checkpoint"
VERSION = 3
"""Versions 1 and 2 had other digests, and were never released."""
MAX_MANIFEST_BYTES = 1 << 30
_FIRST_LINE = b'{"sha256": "%s",\n'
_FIRST_LINE_BYTES = len(_FIRST_LINE) - 2 + 64
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
_KEYS = {
    "format",
    "version",
    "step",
    "epoch",
    "attempt",
    "tensors",
    "scalars",
    "groups",
    "ties",
    "frozen",
    "buffers",
    "extra",
    "layout",
    "files",
}


class OtherVersion(CheckpointError):
    """The checkpoint has another version of the format: it is not damaged, but this program must neither read nor skip it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file's size in bytes, and its blocks' digests as one string."""

    size: int
    blocks: str

    @property
    def digest(self) -> str:
        """The digest of the whole file."""
        return file_digest(self.size, self.blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The values of a manifest. `epoch` and `attempt` are those of the save; `layout` is any JSON of its writer."""

    contents: Contents
    places: Mapping[TensorKey, StoredTensor]
    files: Mapping[str, StoredFile]
    step: int
    epoch: int
    attempt: int
    layout: Any = None

    @property
    def order(self) -> tuple[int, int, int]:
        """The order in time: newer is greater."""
        return self.step, self.epoch, self.attempt


def manifest_of(plan: FilePlan, files: Mapping[str, StoredFile], *, step: int, epoch: int, attempt: int, layout: Any) -> Manifest:
    """Returns the manifest of files that were written by this plan."""
    return Manifest(contents=plan.contents, places=plan.places, files=files, step=step, epoch=epoch, attempt=attempt, layout=layout)


def encode(manifest: Manifest, where: str) -> bytes:
    """Returns the bytes of the file. Raises CheckpointError if settings or extra are not JSON."""
    contents = manifest.contents
    tensors: dict[str, dict[str, Any]] = {name: {} for name in contents.tensors}
    for name, states in contents.tensors.items():
        for state, spec in states.items():
            tensors[name][state] = {"shape": list(spec.shape), "dtype": spec.dtype, **_where(manifest.places[name, state])}
    body = {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.step,
        "epoch": manifest.epoch,
        "attempt": manifest.attempt,
        "tensors": tensors,
        "scalars": {name: dict(values) for name, values in contents.scalars.items()},
        "groups": [{"names": list(group.names), "settings": dict(group.settings)} for group in contents.groups],
        "ties": dict(contents.ties),
        "frozen": sorted(contents.frozen),
        "buffers": sorted(contents.buffers),
        "extra": dict(contents.extra),
        "layout": manifest.layout,
        "files": {name: {"size": file.size, "digest": file.digest, "blocks": file.blocks} for name, file in manifest.files.items()},
    }
    text = dumps(with_special_floats(body), where)[1:] + b"\n"
    return _FIRST_LINE % hashlib.sha256(text).hexdigest().encode() + text


def slicing_json(slicing: Slicing) -> dict[str, Any]:
    """Returns a slicing as JSON for the manifest."""
    return {
        "dim": slicing.dim,
        "widths": [list(part) for part in slicing.widths],
        "padded": None if slicing.padded is None else list(slicing.padded),
    }


def _where(place: StoredTensor) -> dict[str, Any]:
    if isinstance(place, TensorPlace):
        return {"file": place.file, "offset": place.offset}
    return {"slicing": slicing_json(place.slicing), "slices": [{"file": part.file, "offset": part.offset} for part in place.slices]}


def decode(data: bytes, where: str) -> Manifest:
    """Parses and checks a manifest. Raises CheckpointError with `where` and the reason, OtherVersion for another format version."""
    text = data[_FIRST_LINE_BYTES:]
    if data[:_FIRST_LINE_BYTES] != _FIRST_LINE % hashlib.sha256(text).hexdigest().encode():
        raise CheckpointError(f"{where}: damaged: its first line is not the digest of the rest")
    body = loads(data, where)
    del body["sha256"]
    if body.get("format") != FORMAT or type(body.get("version")) is not int:
        raise CheckpointError(f"{where}: not a manifest of the format {FORMAT!r}")
    if body["version"] != VERSION:
        advice = "update this program" if body["version"] > VERSION else "read it with the program that wrote it"
        raise OtherVersion(f"{where}: it has format version {body['version']}, and this program reads {VERSION}: {advice}")
    if missing := _KEYS - body.keys():
        raise CheckpointError(f"{where}: these entries are missing: {', '.join(sorted(missing))}")
    try:
        return _manifest(body)
    except (KeyError, TypeError, ValueError, AttributeError, CheckpointError) as error:
        raise CheckpointError(f"{where}: malformed ({type(error).__name__}: {error})") from error


def _manifest(body: Mapping[str, Any]) -> Manifest:
    places: dict[TensorKey, StoredTensor] = {}
    tensors: dict[str, dict[str, Spec]] = {}
    files = {_file_name(name): _stored(name, fields) for name, fields in body["files"].items()}
    for name, states in body["tensors"].items():
        tensors[name] = {}
        for state, fields in states.items():
            places[name, state] = (_sliced if "slicing" in fields else _place)(f"{name!r}, {state!r}", fields, files)
            tensors[name][state] = places[name, state].spec
    contents = Contents(
        tensors=tensors,
        scalars={name: dict(values) for name, values in without_special_floats(body["scalars"]).items()},
        groups=tuple(
            Group(names=tuple(_strings(group["names"])), settings=dict(without_special_floats(group["settings"])))
            for group in body["groups"]
        ),
        ties={str(tied): str(base) for tied, base in body["ties"].items()},
        frozen=frozenset(_strings(body["frozen"])),
        buffers=frozenset(_strings(body["buffers"])),
        step=_count(body["step"]),
        extra=dict(without_special_floats(body["extra"])),
    )
    step, epoch, attempt = (_count(body[key]) for key in ("step", "epoch", "attempt"))
    return Manifest(
        contents=contents,
        places=places,
        files=files,
        step=step,
        epoch=epoch,
        attempt=attempt,
        layout=without_special_floats(body["layout"]),
    )


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} is not a count")
    return value


def _strings(values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError("a list of names is expected")
    return values


def _file_name(name: str) -> str:
    if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
        raise ValueError(f"{name[:300]!r} cannot be the name of a file in a checkpoint")
    return name


def _stored(name: str, fields: Mapping[str, Any]) -> StoredFile:
    file = StoredFile(size=_count(fields["size"]), blocks=str(fields["blocks"]))
    if len(file.blocks) != DIGITS * block_count(file.size) or not re.fullmatch("[0-9a-f]*", file.blocks) or file.digest != fields["digest"]:
        raise ValueError(f"the digests of {name} contradict each other")
    return file


def _spec(what: str, fields: Mapping[str, Any]) -> Spec:
    if fields["dtype"] not in CODES:
        raise ValueError(f"{what} has unknown dtype {fields['dtype']!r}")
    return Spec(shape=tuple(map(_count, fields["shape"])), dtype=fields["dtype"])


def _place(what: str, fields: Mapping[str, Any], files: Mapping[str, StoredFile]) -> TensorPlace:
    place = TensorPlace(file=fields["file"], offset=_count(fields["offset"]), spec=_spec(what, fields))
    if place.file not in files or place.offset + place.spec.bytes > files[place.file].size:
        raise ValueError(f"{what} lies outside of its file")
    return place


def _sliced(what: str, fields: Mapping[str, Any], files: Mapping[str, StoredFile]) -> Sliced:
    spec, cut = _spec(what, fields), fields["slicing"]
    slicing = Slicing(
        dim=_count(cut["dim"]),
        widths=tuple(tuple(map(_count, part)) for part in cut["widths"]),
        padded=None if cut["padded"] is None else tuple(map(_count, cut["padded"])),
    )
    slicing.check(spec.shape)
    if len(fields["slices"]) != slicing.ranks:
        raise ValueError(f"{what} has {len(fields['slices'])} slices for {slicing.ranks} ranks")
    shapes = [slicing.shape(spec.shape, rank) for rank in range(slicing.ranks)]
    slices = [
        _place(what, {**part, "shape": shape, "dtype": spec.dtype}, files) for part, shape in zip(fields["slices"], shapes, strict=True)
    ]
    return Sliced(spec=spec, slicing=slicing, slices=tuple(slices))
