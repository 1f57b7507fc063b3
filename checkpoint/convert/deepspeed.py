"""DeepSpeed's checkpoints: ZeRO stages 1, 2, 3 and Universal, read; Universal, written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from elastic.checkpoint.convert.deepspeed_models import Opening
from elastic.checkpoint.convert.deepspeed_pieces import PieceSource
from elastic.checkpoint.convert.deepspeed_universal import read_universal
from elastic.checkpoint.convert.deepspeed_write import write
from elastic.checkpoint.convert.deepspeed_zero import read_zero
from elastic.errors import CheckpointError

__all__ = ["detect", "open_source", "write"]


def detect(path: str | os.PathLike[str]) -> str | None:
    """`deepspeed-universal`, `deepspeed`, or None if the directory is neither (nor names one of its own in `latest`)."""
    folder = _folder(Path(path))
    if (folder / "zero").is_dir() and any(folder.glob("*mp_rank_*_model_states.pt")):
        return "deepspeed-universal"
    return "deepspeed" if any(folder.glob("*zero_pp_rank_*_optim_states.pt")) else None


def open_source(path: str | os.PathLike[str], *, trusted: bool = False, drops: Callable[[str], bool] = lambda _: False) -> PieceSource:
    """A DeepSpeed checkpoint, or the one that `latest` in its parent names, without the parameters that `drops` says.

    Raises CheckpointError naming file and reason.
    """
    folder = _folder(Path(path))
    match detect(folder):
        case "deepspeed-universal":
            return read_universal(Opening(folder=folder, trusted=trusted, drops=drops))
        case "deepspeed":
            return read_zero(Opening(folder=folder, trusted=trusted, drops=drops))
    raise CheckpointError(f"{folder}: no ZeRO shards (zero_pp_rank_*_optim_states.pt) and no zero/ of a Universal checkpoint")


def _folder(path: Path) -> Path:
    for hint in ("latest", "latest_universal"):
        if (path / hint).is_file():
            tag = (path / hint).read_text(errors="replace").strip()
            if tag and Path(tag).name == tag and (path / tag).is_dir():
                return path / tag
    return path
