"""Train functions for a model that is cut into a list of layers and whose checkpoints use the model's own names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

import elastic
from tests.checkpoint import pretrained


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class Language(nn.Module):
    """With a tied head, a frozen parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"embed": nn.Embedding(pretrained.VOCABULARY, 8), "blocks": nn.ModuleList(Block() for _ in range(3))})
        self.head = Head()
        self.head.out.weight = self.body["embed"].weight  # pyright: ignore[reportAttributeAccessIssue]

    def layers(self) -> list[Any]:
        return [self.body["embed"], *self.body["blocks"], self.head]  # pyright: ignore[reportGeneralTypeIssues]


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, pretrained.VOCABULARY, bias=False)
        self.scale = nn.Parameter(torch.ones(8), requires_grad=False)
        self.register_buffer("shift", torch.full((8,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x * self.scale + self.shift)


def build() -> Language:
    torch.manual_seed(3)
    return Language()


def train(job: elastic.Job, directory: str, named: bool, steps: int) -> str | None:
    """The digest of the parameters."""
    model = build()
    layers = nn.Sequential(*model.layers())
    trainer = elastic.Trainer(
        layers,
        lambda logits, batch: functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()),
        torch.optim.AdamW([parameter for parameter in layers.parameters() if parameter.requires_grad], lr=0.01),
        pretrained.tokens,
        batch_size=8,
        micro_batch_size=2,
        checkpoint=directory,
        names=model if named else None,
    )
    for _ in trainer.run(steps):
        pass
    return trainer.digest()


class Gpt2First(nn.Module):
    def __init__(self, body: Any) -> None:
        super().__init__()
        self.wte, self.wpe = body.wte, body.wpe

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))


class Gpt2Block(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.block(x)
        return out if isinstance(out, torch.Tensor) else out[0]


class LlamaBlock(nn.Module):
    def __init__(self, block: nn.Module, rotary: nn.Module) -> None:
        super().__init__()
        self.block, self.rotary = block, rotary

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[1])[None]
        out = self.block(x, position_ids=positions, position_embeddings=self.rotary(x, positions))
        return out if isinstance(out, torch.Tensor) else out[0]


def cut(model: Any) -> nn.Sequential:
    """A causal model of transformers as layers, made of its own modules."""
    if hasattr(model, "transformer"):
        body = model.transformer
        return nn.Sequential(Gpt2First(body), *map(Gpt2Block, body.h), body.ln_f, model.lm_head)
    body = model.model
    blocks = [LlamaBlock(block, body.rotary_emb) for block in body.layers]
    return nn.Sequential(body.embed_tokens, *blocks, body.norm, model.lm_head)


def train_pretrained(job: elastic.Job, kind: str, directory: str) -> str | None:
    """The digest of the parameters of a model of transformers in two stages."""
    model = pretrained.build(kind)
    model.config._attn_implementation = "sdpa"
    layers = cut(model)
    trainer = elastic.Trainer(
        layers,
        pretrained.loss,
        torch.optim.AdamW(layers.parameters(), lr=0.01),
        pretrained.tokens,
        batch_size=8,
        micro_batch_size=2,
        checkpoint=directory,
        names=model,
    )
    for _ in trainer.run(2):
        pass
    return trainer.digest()
