"""Tests that a loss weighted by tokens does not depend on how lengths fall into micro-batches."""

from __future__ import annotations

from functools import partial
from typing import Any

import harness
import pytest
import torch
from torch import nn
from torch.nn import functional

import elastic
from elastic.engine.losses import token_loss
from elastic.errors import TrainerError

WORDS, SAMPLES = 11, 24


def sample(index: int) -> torch.Tensor:
    """A text of 2 to 12 tokens."""
    return torch.randint(1, WORDS, (2 + index * 7 % 11,), generator=torch.Generator().manual_seed(index))


def collate(texts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Pads to the longest text of a micro-batch."""
    labels = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=-100)
    return {"input_ids": labels.clamp_min(0), "labels": labels}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.words(input_ids))}


def train(job: Any, micro_batch_size: int, weighted: bool) -> tuple[list[float], str]:
    def mean(output: Any, batch: Any) -> torch.Tensor:
        total, count = token_loss(output, batch)
        return total / count

    torch.manual_seed(1)
    model, data = Model(), [sample(index) for index in range(SAMPLES)]
    options: dict[str, Any] = {"batch_size": 12, "micro_batch_size": micro_batch_size, "collate": collate}
    trainer = elastic.Trainer(model, token_loss if weighted else mean, torch.optim.SGD(model.parameters(), lr=0.5), data, **options)
    return [report.loss for report in trainer.run(4)], trainer.digest()


@pytest.mark.slow
def test_the_loss_is_the_mean_over_the_tokens_of_the_step():
    found = {size: harness.run(train, workers=1, args=(size, True))[0] for size in (1, 3, 12)}
    assert found[1][0] == pytest.approx(found[12][0], rel=1e-6)
    assert found[3][0] == pytest.approx(found[12][0], rel=1e-6)
    assert harness.run(train, workers=2, args=(3, True)) == [found[3]] * 2
    other = {size: harness.run(train, workers=1, args=(size, False))[0][0] for size in (1, 12)}
    assert other[12] == pytest.approx(found[12][0], rel=1e-6)
    assert abs(other[1][0] - other[12][0]) > 1e-3  # the mean of means is another number


def test_the_sum_and_the_number_of_labels():
    logits = torch.randn(2, 4, WORDS, requires_grad=True)
    labels = torch.tensor([[1, 2, -100, 3], [4, 5, 6, -100]])
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    for output in (logits, {"logits": logits}, {"logits": logits, "loss": None}, {"loss": expected / 4}):
        for batch in ({"labels": labels}, (None, labels)):
            total, count = token_loss(output, batch)
            assert count == 4.0
            assert total.item() == pytest.approx(expected.item())
    whole = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    total, count = partial(token_loss, shift=False)(logits, {"labels": labels})
    assert (total.item(), count) == (pytest.approx(whole.item()), 6.0)


def test_a_micro_batch_without_labels():
    total, count = token_loss(torch.randn(1, 3, WORDS), {"labels": torch.full((1, 3), -100)})
    assert (total.item(), count) == (0.0, 0.0)
    for batch in ({"input_ids": torch.ones(1, 2)}, torch.ones(1, 2), (1,), {"labels": [1]}):
        with pytest.raises(TrainerError, match="finds no labels in the micro-batch"):
            token_loss(torch.randn(1, 2, WORDS), batch)
