"""Reads DeepSpeed's checkpoints (without ZeRO, ZeRO stages 1, 2, 3, and Universal), and writes Universal ones."""

from __future__ import annotations

import os
from pathlib import Path

from elastic.checkpoint.convert.deepspeed_models import Opening
from elastic.checkpoint.convert.deepspeed_plain import read_plain
from elastic.checkpoint.convert.deepspeed_universal import read_universal
from elastic.checkpoint.convert.deepspeed_write import write
from elastic.checkpoint.convert.deepspeed_zero import read_zero
from elastic.checkpoint.convert.rules import Rules
from elastic.checkpoint.state import Source
from elastic.errors import CheckpointError

__all__ = ["detect", "open_source", "write"]


def detect(path: str | os.PathLike[str]) -> str | None:
    """Returns `deepspeed-universal`, `deepspeed`, or None if neither the directory nor the one that its `latest` names is one."""
    folder = _folder(Path(path))
    if (folder / "zero").is_dir() and any(folder.glob("*mp_rank_*_model_states.pt")):
        return "deepspeed-universal"
    if any(folder.glob("*zero_pp_rank_*_optim_states.pt")) or any(folder.glob("*mp_rank_*_model_states.pt")):
        return "deepspeed"
    return None


def open_source(path: str | os.PathLike[str], *, trusted: bool = False, rules: Rules | None = None) -> Source:
    """Opens a DeepSpeed checkpoint, or the one that `latest` in the directory names, without the parameters that rules drop.

    Raises CheckpointError with file and reason.
    """
    folder, rules = _folder(Path(path)), rules or Rules()
    opening = Opening(folder=folder, trusted=trusted, drops=rules.drops)
    try:
        match detect(folder):
            case "deepspeed-universal":
                return read_universal(opening)
            case "deepspeed" if any(folder.glob("*zero_pp_rank_*_optim_states.pt")):
                return read_zero(opening)
            case "deepspeed":
                return read_plain(opening, rules)
    except CheckpointError:
        opening.files.close()
        raise
    raise CheckpointError(f"{folder}: it has neither *_model_states.pt of DeepSpeed nor zero/ of a Universal checkpoint")


def _folder(path: Path) -> Path:
    for hint in ("latest", "latest_universal"):
        if (path / hint).is_file():
            tag = (path / hint).read_text(errors="replace").strip()
            if tag and Path(tag).name == tag and (path / tag).is_dir():
                return path / tag
    return path
