"""Reads and writes files of `torch.save`: a state dict, or a dict of model, optimizer and more (also Lightning's `.ckpt`)."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic.checkpoint.convert.nested import Nested, interpret, tree_of
from elastic.checkpoint.convert.output import ConversionProgress, Reading, put, run_bytes, silent, streamed
from elastic.checkpoint.convert.rules import Rules
from elastic.checkpoint.pickles import Archive, Opaque, load_archive
from elastic.checkpoint.pickles.write import write_archive
from elastic.checkpoint.state import Source
from elastic.checkpoint.stored import Files, is_tensor
from elastic.errors import CheckpointError


def recognise(path: Path) -> str | None:
    """Returns why a path is such a file; None if it is not."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        found = any(name.endswith("/data.pkl") for name in archive.namelist())
    return "it is a zip file with a record data.pkl" if found else None


def load_tree(path: Path, files: Files, *, trust_pickle: bool = False) -> tuple[Mapping[str, Any], Archive]:
    """Loads the dict of a file, with lazy tensors. Raises CheckpointError."""
    archive = Archive(path, files=files)
    tree = load_archive(archive, trusted=trust_pickle)
    if not isinstance(tree, Mapping):
        what = f"an object of {tree.cls}" if isinstance(tree, Opaque) else "a tensor" if is_tensor(tree) else f"a {type(tree).__name__}"
        advice = ": a pickled module is a program; save its state_dict()" if isinstance(tree, Opaque) else ""
        raise CheckpointError(f"{path} holds {what}, not a dict{advice}")
    return tree, archive


def open_torch(path: Path, *, trust_pickle: bool = False, rules: Rules | None = None) -> Nested:
    """Opens a file. Raises CheckpointError."""
    files = Files()
    try:
        tree, archive = load_tree(path, files, trust_pickle=trust_pickle)
        contents, tensors = interpret(tree, rules=rules or Rules())
    except CheckpointError:
        files.close()
        raise

    def check() -> str:
        checked, bare = archive.verify()
        return f"CRC-32 of {checked} bytes agree; {bare} bytes have no checksum"

    return Nested(format="torch", contents=contents, tensors=tensors, files=files, check=check)


def write_torch(source: Source, path: Path, *, max_memory: int = 1 << 30, progress: ConversionProgress = silent) -> None:
    """Writes a file that `torch.load(weights_only=True)` reads; `max_memory` in bytes.

    The optimizer has the form of its own `state_dict()`, with numbers, and `param_names` in each group.
    """
    tree, _ = tree_of(source, model="model", optimizer="optimizer", numbered=True)
    reading = Reading(source=source, limit=run_bytes(max_memory), progress=progress)
    with put(path, directory=False) as place, place.open("wb") as stream:
        write_archive(stream, streamed(tree, reading))
