"""Trains a small language model on a stream of texts, on elastic workers: `streaming_torch.py` with some lines changed (docs/dropin.md)."""

import random
from collections.abc import Iterator
from typing import Any

import datasets
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import elastic

WORDS, LENGTH = 64, 16


def texts(seed: int) -> Iterator[dict[str, list[int]]]:
    """Yields token ids of texts that count up or down in steps of one to three, as many as are asked for."""
    numbers = random.Random(seed)
    while True:
        first, step = numbers.randrange(WORDS), numbers.choice([-3, -2, -1, 1, 2, 3])
        yield {"ids": [(first + step * place) % WORDS for place in range(LENGTH + 1)]}


def stream(seed: int) -> Any:
    """Returns a streaming dataset of Hugging Face; a real script would open files by load_dataset(..., streaming=True)."""
    found = datasets.IterableDataset.from_generator(texts, gen_kwargs={"seed": seed})
    return found.map(lambda row: {"x": row["ids"][:-1], "y": row["ids"][1:]}, remove_columns=["ids"]).with_format("torch")


class Model(nn.Module):
    """Predicts the next word from the words so far."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.rnn, self.head = nn.Embedding(WORDS, 32), nn.GRU(32, 64, batch_first=True), nn.Linear(64, WORDS)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.words(ids))[0])


def main(job: elastic.Job) -> str | None:
    torch.manual_seed(1)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(stream(seed=1), batch_size=32)
    model, optimizer, loader = job.prepare(model, optimizer, loader, micro_batch_size=4, steps=80)

    for batch in loader:
        loss = functional.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (report := loader.report) is not None and report.leader and report.step % 20 == 19:
            print(f"step {report.step}: loss {report.loss:.3f}")
    return loader.digest()


if __name__ == "__main__":
    elastic.run(main, workers=3)
