"""Fine-tunes a small language model of transformers in plain PyTorch; `finetune.py` does it on elastic workers."""

import random
from typing import Any

import datasets
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

WORDS, END = 64, 1


def texts(count: int, seed: int) -> Any:
    """Returns a dataset of token ids of texts that count up or down in steps of one to three, and end at different lengths."""
    numbers = random.Random(seed)
    rows = []
    for _ in range(count):
        length, first, step = numbers.randint(4, 20), numbers.randrange(60), numbers.choice([-3, -2, -1, 1, 2, 3])
        rows.append([4 + (first + step * place) % 60 for place in range(length)] + [END])
    return datasets.Dataset.from_dict({"input_ids": rows}).with_format("torch")


def padded(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Joins texts into a batch; what is padded has no label."""
    labels = pad_sequence([row["input_ids"] for row in rows], batch_first=True, padding_value=-100)
    return {"input_ids": labels.clamp_min(0), "attention_mask": (labels >= 0).long(), "labels": labels}


def build() -> Any:
    """Returns the model; a real script would load one by from_pretrained."""
    config = transformers.GPT2Config(vocab_size=WORDS, n_embd=48, n_layer=2, n_head=4, n_positions=32, bos_token_id=END, eos_token_id=END)
    return transformers.GPT2LMHeadModel(config)


def held_out_loss(model: Any) -> float:
    """Returns the mean loss over texts that are not trained on."""
    batch = padded(list(texts(64, seed=2)))
    model.eval()
    with torch.no_grad():
        loss = model(**batch).loss.item()
    model.train()
    return loss


def main() -> None:
    torch.manual_seed(1)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    loader = DataLoader(texts(384, seed=1), batch_size=32, shuffle=True, collate_fn=padded)

    for epoch in range(4):
        for batch in loader:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch}: loss {held_out_loss(model):.3f}")


if __name__ == "__main__":
    main()
