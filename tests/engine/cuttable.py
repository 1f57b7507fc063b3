"""Small models whose body is a list of blocks, as those of transformers are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

WORDS, DIM = 16, 8


class Block(nn.Module):
    """Gets the state, a mask by keyword, and a pair of tensors that all blocks share."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.drop = nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor | None, turns: Sequence[torch.Tensor], scale: float) -> torch.Tensor:
        cos, sin = turns
        mixed = self.mix(self.norm(x)) * cos + x.flip(-1) * sin
        mixed = mixed if mask is None else mixed * mask[..., None]
        return x + scale * self.drop(mixed)


class Body(nn.Module):
    """Embeddings, blocks and a norm, with what the blocks share."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(WORDS, DIM), nn.Parameter(torch.randn(1, 12, DIM) * 0.1)
        self.drop = nn.Dropout(0.1)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.LayerNorm(DIM)
        self.register_buffer("angles", torch.linspace(0, 1, DIM), persistent=False)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        x = self.drop(self.word(tokens) + self.place[:, : tokens.shape[1]])
        turns = (self.angles.cos(), self.angles.sin())
        for number, block in enumerate(self.blocks):
            x = self.between(number, block(x, mask=mask if number % 2 else None, turns=turns, scale=0.5))
        return self.norm(x)

    def between(self, number: int, x: torch.Tensor) -> torch.Tensor:
        return x


class Causal(nn.Module):
    """A body and a head that is tied to the words."""

    kind: type[Body] = Body

    def __init__(self, blocks: int = 3, *, tied: bool = True) -> None:
        super().__init__()
        self.body, self.head = self.kind(blocks), nn.Linear(DIM, WORDS, bias=False)
        self.spare = nn.Linear(2, 2)  # that no forward calls
        if tied:
            self.head.weight = self.body.word.weight

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None, labels: torch.Tensor | None = None) -> dict[str, Any]:
        logits = self.head(self.body(tokens, mask))
        loss = None if labels is None else functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"logits": logits, "loss": loss}


def batch(step: int, micro_batch: int) -> dict[str, torch.Tensor]:
    """Tokens and labels; some micro-batches have a mask."""
    generator = torch.Generator().manual_seed(100 * step + micro_batch)
    tokens, labels = torch.randint(WORDS, (2, 2, 6), generator=generator)
    mask = {"mask": torch.tensor([[1.0] * 6, [1.0] * 4 + [0.0] * 2])} if micro_batch % 2 else {}
    return {"tokens": tokens, "labels": labels, **mask}


def own_loss(output: dict[str, Any], _: Any) -> torch.Tensor:
    return output["loss"]
