"""Initial values from files: a Hugging Face directory or one of our checkpoints, of which each worker reads the parts that it needs."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Container, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import nn

from elastic.checkpoint.convert.detect import detect
from elastic.checkpoint.convert.formats import open_source
from elastic.checkpoint.dtypes import dtype_of, name_of
from elastic.checkpoint.objects import Location, place
from elastic.checkpoint.plan import stored_parts
from elastic.checkpoint.reader import ElasticSource
from elastic.checkpoint.state import PARAM, Contents, Source, Spec
from elastic.engine.deferred.recipe import Recipe
from elastic.errors import CheckpointError, TrainerError
from elastic.memory import device
from elastic.memory.tensors import bytes_of, empty, filled
from elastic.worker.naming import Naming
from elastic.worker.restore import persistent_buffers

_AT_ONCE = 1 << 20
"""Elements that are read at once, into memory besides the parameters'."""
_COMPARED = 16
"""Elements at both ends of a tensor that every worker reads, to compare files of different hosts."""


class Weights:
    """Initial values of the tensors that files have, by their names in the model; those of other buffers are computed.

    `bytes_read` counts what was read of tensors, without headers and manifests.
    """

    def __init__(self, where: str | os.PathLike[str], root: nn.Module, naming: Naming, recipe: Recipe, *, warn: bool) -> None:
        """`root` is the model on meta. With `warn`, tensors of the files that the model does not have are named in a warning.

        Raises:
            CheckpointError: if the files cannot be read, lack a parameter, or have one of another shape.
        """
        location = place(os.fspath(where))
        if isinstance(location, Path) and not location.exists():
            raise CheckpointError(f"weights={os.fspath(where)!r}: there is no such file or directory on this host")
        self._recipe, self._where = recipe, os.fspath(where)
        self._source = _opened(location)
        self.bytes_read = 0
        self._digests: dict[str, str] = {}
        watch: Any = getattr(self._source, "watch", None)
        if watch is not None:
            watch(self._note)
        self._names = self._matched(root, naming, warn=warn)

    def _note(self, size: int) -> None:
        self.bytes_read += size

    def close(self) -> None:
        """Closes the files; they are opened again if they are read again."""
        self._source.close()

    def fill(self, name: str, start: int, run: torch.Tensor) -> None:
        stored = self._names.get(name)
        if stored is None:
            run.copy_(self._recipe.value(name).reshape(-1)[start : start + run.numel()])
            return
        with torch.no_grad():
            for first in range(0, run.numel(), _AT_ONCE):
                part = run[first : first + _AT_ONCE]
                read = self._source.read(stored, PARAM, start + first, start + first + part.numel())
                if read.dtype != part.dtype:
                    converted = read.to(part.dtype)
                    self._check_values(name, read, converted)
                    read = converted
                part.copy_(read)

    def _check_values(self, name: str, read: torch.Tensor, converted: torch.Tensor) -> None:
        """Raises CheckpointError if a value of the files is too large for the model's dtype: it would be another one, or infinite."""
        if read.is_complex():
            return
        if read.is_floating_point():
            form = torch.finfo(converted.dtype)
            if form.max >= torch.finfo(read.dtype).max:
                return
            values = read.double()
            large = (values.abs() > form.max) & values.isfinite()
            stays = ~large | (
                (converted.double() - values).abs() <= form.eps * values.abs()
            )  # some dtypes have no infinity: a cast may clamp
        else:
            values = read.long()
            stays = converted.long() == values
        if (lost := values[~stays]).numel():
            kind, theirs = name_of(converted.dtype), name_of(read.dtype)
            raise CheckpointError(
                f"weights={self._where!r}: {name} of the model is {kind}, which has no room for the value {lost[0].item():g} that it has "
                f"in the files: build the model with a dtype that does, such as theirs, {theirs}"
            )

    def value(self, name: str) -> torch.Tensor:
        shape, dtype = self._recipe.form(name)
        found = empty(shape, dtype)
        self.fill(name, 0, found.view(-1))
        return found

    def sample(self, name: str) -> torch.Tensor:
        try:
            return device.placed(self._recipe.value(name))
        except TrainerError:  # only the files have its values, and no file is read for measuring
            shape, dtype = self._recipe.form(name)
            return filled(shape, 0.02, dtype)

    def digest(self, name: str) -> str | None:
        if (stored := self._names.get(name)) is None:
            return self._recipe.digest(name) if name in self._recipe else None
        if name not in self._digests:
            spec = _spec(self._source.contents, stored)
            total = hashlib.sha256(f"{stored} {spec} {self._recipe.form(name)} {self._checksums(stored)}".encode())
            for start, stop in self._ends(spec):
                total.update(bytes_of(self._source.read(stored, PARAM, start, stop)).data)
            self._digests[name] = total.hexdigest()
        return self._digests[name]

    def _checksums(self, stored: str) -> str:
        """Returns the checksums that a checkpoint of ours has of the files with a tensor; other formats have none."""
        if not isinstance(self._source, ElasticSource):
            return ""
        files = self._source.manifest.files
        return " ".join(files[each.file].blocks for each in stored_parts(self._source.place(stored)))

    def _ends(self, spec: Spec) -> list[tuple[int, int]]:
        return [] if isinstance(self._source, ElasticSource) else _ends(spec)

    def _matched(self, root: nn.Module, naming: Naming, *, warn: bool) -> dict[str, str]:
        """Returns the name in the files of each parameter, and of each buffer that they have."""
        contents = self._source.contents
        aliases: dict[int, list[str]] = {}
        for name, parameter in root.named_parameters(remove_duplicate=False):
            aliases.setdefault(id(parameter), []).append(name)
        present = {*contents.tensors, *contents.ties}
        found: dict[str, str] = {}
        missing: list[str] = []
        others: set[str] = set()  # further names, in the files, of tied parameters
        for name, tensor in [*root.named_parameters(), *persistent_buffers(root)]:
            tried = [each for alias in aliases.get(id(tensor), [name]) for each in (naming.saved.get(alias), alias) if each]
            stored = next((each for each in tried if each in present), None)
            if stored is not None:
                found[name] = contents.ties.get(stored, stored)
                self._check_form(name, tensor, stored, present)
                further = {naming.saved.get(alias, alias) for alias in aliases.get(id(tensor), [])} & present
                self._check_tie(stored, further)
                others |= further
            elif isinstance(tensor, nn.Parameter):
                missing.append(_called(name, naming))
        if missing:
            raise self._lacks(missing, present, all_of_them=not found)
        used = {contents.ties.get(stored, stored) for stored in {*found.values(), *others}}
        if warn and (left := sorted(set(contents.tensors) - used)):
            warnings.warn(f"weights={self._where!r} has {_some(left)}, which the model does not have: not read", stacklevel=4)
        return found

    def _check_tie(self, stored: str, further: Set[str]) -> None:
        """Raises CheckpointError if the files have another tensor under a further name of a parameter. Both ends are compared."""
        contents = self._source.contents
        first = contents.ties.get(stored, stored)
        for other in sorted({contents.ties.get(each, each) for each in further} - {first}):
            spec = _spec(contents, first)
            if spec.shape != _spec(contents, other).shape or any(self._differs(first, other, run) for run in _ends(spec)):
                raise CheckpointError(
                    f"weights={self._where!r} has different tensors as {first} and {other}, which are one (tied) parameter of the model: "
                    "build the model without tying them, or give weights= in which they are equal"
                )

    def _differs(self, one: str, other: str, run: tuple[int, int]) -> bool:
        return not torch.equal(self._source.read(one, PARAM, *run).double(), self._source.read(other, PARAM, *run).double())

    def _check_form(self, name: str, tensor: torch.Tensor, stored: str, present: Container[str]) -> None:
        spec = _spec(self._source.contents, stored)
        own = f"{name} of the model" if name == stored else f"{name} of the model ({stored} in the files)"
        if tuple(spec.shape) != tuple(tensor.shape):
            raise CheckpointError(
                f"weights={self._where!r}: {own} has shape {tuple(tensor.shape)}, and {tuple(spec.shape)} in the files: build the model "
                "with the sizes of these weights, or give weights= that fit it"
            )
        if _kind(tensor.dtype) != _kind(dtype_of(spec.dtype)):
            kind = name_of(tensor.dtype)
            raise CheckpointError(f"weights={self._where!r}: {own} is {kind}, and {spec.dtype} in the files, which cannot be converted")
        scale = next((each for each in (f"{stored}_scale_inv", f"{stored}_scale") if each in present), None)
        if scale is not None and spec.dtype.startswith("float8") and tensor.dtype != dtype_of(spec.dtype):
            raise CheckpointError(
                f"weights={self._where!r}: {own} is {spec.dtype} in the files, to be multiplied by {scale}, which is not "
                "done here: give weights= that are not quantised, in bfloat16 or float32"
            )

    def _lacks(self, missing: Sequence[str], present: set[str], *, all_of_them: bool) -> CheckpointError:
        names = f" Their names are such as {min(present)!r}." if present else ""
        rename = "names= (a mapping or a function from the model's names to theirs)" if all_of_them else "weights= that have it"
        return CheckpointError(f"weights={self._where!r} has no {_some(missing)}, which the model has.{names} Give the Trainer {rename}")


def _opened(location: Location) -> Source:
    try:
        return open_source(location, detect(location).name)
    except CheckpointError as error:
        raise CheckpointError(f"weights={str(location)!r} cannot be read: {error}") from error


def _kind(dtype: torch.dtype) -> tuple[bool, bool]:
    return dtype.is_floating_point, dtype.is_complex


def _ends(spec: Spec) -> list[tuple[int, int]]:
    return sorted({(0, min(spec.elements, _COMPARED)), (max(0, spec.elements - _COMPARED), spec.elements)})


def _spec(contents: Contents, stored: str) -> Spec:
    tensors: Mapping[str, Mapping[str, Spec]] = contents.tensors
    return tensors[contents.ties.get(stored, stored)][PARAM]


def _called(name: str, naming: Naming) -> str:
    saved = naming.saved.get(name, name)
    return name if saved == name else f"{saved} ({name} of the model)"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
