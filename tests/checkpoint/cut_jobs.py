"""Trains models of transformers that the Trainer cuts into layers itself."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

import elastic
from tests.checkpoint import pretrained


def digest(model: Any) -> str:
    """Of the model's parameters, by its own names."""
    total = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        total.update(name.encode())
        total.update(parameter.detach().numpy().tobytes())
    return total.hexdigest()


def train_adapters(job: elastic.Job, directory: str) -> tuple[str, list[str], str]:
    """Trains adapters of a GPT-2; returns the trainer's digest, the names of the changed parameters, and the layout."""
    import peft  # pyright: ignore[reportMissingImports]

    def build() -> Any:
        torch.manual_seed(4)
        config = peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["c_attn"], fan_in_fan_out=True)
        return peft.get_peft_model(pretrained.build("GPT2LMHeadModel"), config)

    model = build()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.05)
    options: dict[str, Any] = {"batch_size": 8, "micro_batch_size": 2, "checkpoint": directory}
    trainer = elastic.Trainer(model, pretrained.loss, optimizer, pretrained.tokens, **options)
    for _ in trainer.run(2):
        pass
    whole, first = trainer.state_dict(), build().state_dict()
    changed = [name for name, value in whole.items() if not torch.equal(value, first[name])]
    return trainer.digest(), changed, trainer.layout


def train(job: elastic.Job, kind: str, directory: str) -> tuple[str, str, str]:
    """Returns the trainer's digest, that of the trained model, and the layout."""
    model = pretrained.build(kind)
    trainer = elastic.Trainer(
        model,
        pretrained.loss,
        torch.optim.AdamW(model.parameters(), lr=0.01),
        pretrained.tokens,
        batch_size=8,
        micro_batch_size=2,
        checkpoint=directory,
    )
    for _ in trainer.run(2):
        pass
    whole, layout = trainer.state_dict(), trainer.layout
    model = pretrained.build(kind)
    model.load_state_dict(whole)
    return trainer.digest(), digest(model), layout
