"""The train function that the harness uses without `--script`: a small GPT with fast steps, on bytes that follow from a seed."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

import elastic

_VOCABULARY, _SEQ, _DIM, _HEADS, _LAYERS, _SAMPLES = 64, 16, 32, 2, 4, 200


class _Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(_VOCABULARY, _DIM)
        self.position = nn.Embedding(_SEQ, _DIM)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.token(tokens) + self.position(torch.arange(tokens.shape[1]))


class _Block(nn.Module):
    """A transformer block with causal attention: (samples, seq, dim) to the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(_DIM) for _ in range(2))
        self.qkv, self.project = nn.Linear(_DIM, 3 * _DIM), nn.Linear(_DIM, _DIM)
        self.feed = nn.Sequential(nn.Linear(_DIM, 4 * _DIM), nn.GELU(), nn.Linear(4 * _DIM, _DIM), nn.Dropout(0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        samples, seq, _ = x.shape
        query, key, value = self.qkv(self.norms[0](x)).view(samples, seq, 3, _HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(samples, seq, _DIM))
        return x + self.feed(self.norms[1](x))


class _Text(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Windows of a text in which each byte mostly follows from the one before."""

    def __len__(self) -> int:
        return _SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = torch.arange(index, index + _SEQ + 1)
        text = (start * 7 + start.square() % 11) % _VOCABULARY
        return text[:-1], text[1:]


def _loss(logits: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten())


def train(job: Any, steps: int = 1_000_000, pause_s: float = 0.03) -> str | None:
    """Trains `steps` steps, each followed by a pause, so that a machine with few processors has room for many workers."""
    torch.manual_seed(0)
    model = nn.Sequential(_Embedding(), *(_Block() for _ in range(_LAYERS)), nn.Linear(_DIM, _VOCABULARY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = elastic.Trainer(model, _loss, optimizer, _Text(), batch_size=16, micro_batch_size=2, clip_norm=1.0, seed=1)
    for _ in trainer.run(steps):
        time.sleep(pause_s)
    return trainer.digest()
