"""Train functions for a model with a configuration like those of Hugging Face, and for real models of it if installed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import elastic

VOCABULARY = 40


class Config:
    """A configuration with the attributes that the Trainer reads."""

    def to_json_string(self) -> str:
        return json.dumps({"model_type": "tiny", "tie_word_embeddings": False, "note": "größe"})


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = Config()
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens))


def build(kind: str) -> nn.Module:
    """`tiny`, or the name of a class of transformers."""
    torch.manual_seed(3)
    if kind == "tiny":
        return Tiny()
    import transformers  # pyright: ignore[reportMissingImports]

    if kind == "GPT2LMHeadModel":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 1}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCABULARY, use_cache=False, **sizes))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCABULARY, use_cache=False, **sizes))


def tokens(step: int, micro_batch: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(100 * step + micro_batch))


def loss(output: Any, batch: torch.Tensor) -> torch.Tensor:
    logits = output if isinstance(output, torch.Tensor) else output["logits"]
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def train(job: elastic.Job, kind: str, directory: str, tokenizer: str) -> str:
    """The digest of the logits that the trained model gives for the first tokens."""
    model = build(kind)
    trainer = elastic.Trainer(
        model,
        loss,
        torch.optim.AdamW(model.parameters(), lr=0.01),
        tokens,
        batch_size=8,
        micro_batch_size=2,
        exact=False,
        checkpoint=directory,
        checkpoint_files={"tokenizer.json": Path(tokenizer), "vocab.txt": "a\nb\n", "spiece.model": b"\0\1"},
    )
    for _ in trainer.run(2):
        pass
    with torch.no_grad():
        output = model.eval()(tokens(0, 0))
    return digest(output if isinstance(output, torch.Tensor) else output["logits"])
