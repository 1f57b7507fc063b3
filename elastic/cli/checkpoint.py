"""The command `elastic checkpoint`."""

from __future__ import annotations

import typer


def checkpoint(context: typer.Context) -> None:
    """Shows, compares and converts checkpoints of any format, and cleans up their directories."""
    from elastic.checkpoint.cli import main as checkpoints  # imports torch, which the other commands do not need

    checkpoints(context.args, "elastic checkpoint")
