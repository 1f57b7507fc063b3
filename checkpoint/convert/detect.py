"""Detects the format of the checkpoint at a path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from elastic.checkpoint.convert.formats import FORMATS, function
from elastic.checkpoint.objects import Location
from elastic.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Detected:
    """A format's name, and the reason why it was recognised."""

    name: str
    why: str


def detect(path: Location) -> Detected:
    """Detects the format at a path; a URL always has our own format. Raises CheckpointError with what each format looks for."""
    if isinstance(path, str):
        return Detected(name="elastic", why="it is a URL")
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    for entry in FORMATS.values():
        try:
            recognise = function(entry.recognise, f"read {entry.name}")
        except CheckpointError:
            continue
        if why := recognise(path):
            return Detected(name=entry.name, why=why)
    hint = _hint(path)
    looked = "; ".join(f"{entry.name}: {entry.looks}" for entry in FORMATS.values())
    raise CheckpointError(f"{path} is not a checkpoint of a known format{hint}. Looked for: {looked}")


def _hint(path: Path) -> str:
    if path.is_file():
        with path.open("rb") as stream:
            first = stream.read(2)
        return ", but it may be a file of torch.save before torch 1.6, which is not read" if first == b"\x80\x02" else ""
    names = sorted(entry.name for entry in path.iterdir())
    if any(name.endswith(".distcp") for name in names):
        return ": it has .distcp files but no .metadata, so its save did not finish"
    if any(name.startswith("mp_rank_") for name in names):
        return ": it looks like Megatron-LM's, but the files model_optim_rng.pt of its ranks are missing"
    below = [name for name in names if (path / name).is_dir() and not name.startswith(".")][:5]
    return (
        f" (it has directories {', '.join(below)}: name one of these)"
        if below
        else " (it holds " + (", ".join(names[:5]) or "nothing") + ")"
    )
