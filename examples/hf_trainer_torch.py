"""Fine-tunes a small language model by a Trainer of transformers. docs/frameworks.md has the same with elastic."""

import random
from typing import Any

import datasets
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

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


def main() -> None:
    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=WORDS, n_embd=48, n_layer=2, n_head=4, n_positions=32, bos_token_id=END, eos_token_id=END)
    model = transformers.GPT2LMHeadModel(config)
    arguments = TrainingArguments(
        output_dir="finetuned",
        num_train_epochs=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=8,
        learning_rate=5e-3,
        warmup_steps=5,
        eval_strategy="epoch",
        save_strategy="no",
        logging_steps=10,
        report_to="none",
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, data_collator=padded, train_dataset=texts(384, seed=1), eval_dataset=texts(64, seed=2))
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    print(f"loss {loss:.3f}")


if __name__ == "__main__":
    main()
