"""What both sides train: the same model, optimizer, text and order of samples."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from measure import SEQ
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[1]))

from examples.gpt import Text, build_gpt, cross_entropy, read_text

SEED = 0


def build_model() -> nn.Sequential:
    """Returns the example's GPT at its defaults, with the same initial parameters in every process."""
    torch.manual_seed(SEED)
    return build_gpt(layers=8, dim=256, heads=8, seq=SEQ, dropout=0.0)


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def build_text() -> Text:
    return Text(read_text(None), SEQ)


__all__ = ["SEED", "build_model", "build_optimizer", "build_text", "cross_entropy"]
