"""Tests models cut into layers: the rule, the bits, the names, and what is refused."""

from __future__ import annotations

from typing import Any

import cuttable
import harness
import pytest
import torch
from torch import nn

import elastic
from elastic.engine.cutting.check import check, some_loss
from elastic.engine.cutting.layers import cut, layers
from elastic.engine.loss_scale import LossScale
from elastic.engine.model import LayeredModel
from elastic.engine.numerics import Numerics
from elastic.errors import TrainerError

BATCH = cuttable.batch(0, 1)


def model(kind: type[cuttable.Body] = cuttable.Body, **options: Any) -> cuttable.Causal:
    torch.manual_seed(0)
    return type("Causal", (cuttable.Causal,), {"kind": kind})(**options)


def test_the_layers_have_the_parts_and_the_names_of_the_model():
    whole = model()
    found = layers(whole, example=BATCH)
    assert [type(layer).__name__ for layer in found] == ["First", "Block", "Block", "Block", "Last"]
    assert {name for name, _ in found[0].named_parameters()} == {"body.word.weight", "body._own.place"}
    assert {name for name, _ in found[2].named_parameters()} == {
        f"body.blocks.1.{n}.{w}" for n in ("norm", "mix") for w in ("weight", "bias")
    }
    assert {id(each) for each in found[4].parameters()} == {
        id(each) for part in (whole.body.norm, whole.head, whole.spare) for each in part.parameters()
    }
    assert list(found.state_dict()) == list(whole.state_dict())
    assert {id(each) for each in found.parameters()} == {id(each) for each in whole.parameters()}
    spec = LayeredModel(found).spec
    assert [tie.home for tie in spec.layers[4].ties] == [0]


def test_the_layers_have_the_modes_of_the_model():
    whole = model()
    found = layers(whole, example=BATCH)
    whole.eval()
    assert not found[0].training
    assert torch.equal(found(BATCH)["logits"], whole(**BATCH)["logits"])
    found.train()
    assert whole.body.training
    assert whole.body.blocks[0].drop.training
    assert not torch.equal(found(BATCH)["logits"], whole(**BATCH)["logits"])  # dropout


def test_frozen_parameters_and_recomputation_have_the_bits_of_the_model():
    whole = model()
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_("norm" in name)
    found = cut(whole, BATCH)
    check(LayeredModel(found), found, some_loss, Numerics(seed=3), BATCH)
    check(LayeredModel(found), found, some_loss, Numerics(seed=3, checkpoint=lambda *_: True), BATCH)
    check(LayeredModel(found), found, cuttable.own_loss, Numerics(seed=3, autocast=torch.bfloat16), BATCH)
    check(LayeredModel(found), found, cuttable.own_loss, Numerics(seed=3, scale=LossScale.of(8.0)), BATCH)
    assert all(parameter.grad is None for parameter in whole.parameters())
    assert [n for n, each in whole.named_parameters() if each.requires_grad] == [n for n, _ in whole.named_parameters() if "norm" in n]


def train(job: Any, kind: str) -> tuple[str, list[float], list[str], str]:
    whole = model()
    trainer = elastic.Trainer(
        layers(whole, example=BATCH),
        cuttable.own_loss,
        torch.optim.AdamW(whole.parameters(), lr=0.01),
        cuttable.batch,
        batch_size=8,
        micro_batch_size=2,
        checkpoint_activations=kind == "recomputed",
    )
    losses = [report.loss for report in trainer.run(3)]
    return trainer.digest(), losses, list(trainer.state_dict()), trainer.layout


@pytest.mark.slow
def test_a_pipeline_of_them_has_the_bits_of_one_worker():
    alone = harness.run(train, workers=1, args=("plain",))[0]
    assert alone[2] == list(model().state_dict())
    for workers, stages, kind in ((2, 2, "plain"), (3, 3, "recomputed")):
        found = harness.run(train, workers=workers, stages=stages, args=(kind,))
        assert len({each[0] for each in found} | {alone[0]}) == 1
        assert all(each[1] == alone[1] for each in found)
        assert found[0][3].count("]") == stages


class Scaling(cuttable.Body):
    def between(self, number: int, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Normed(cuttable.Body):
    """Blocks get what the norm behind them made of the state."""

    def between(self, number: int, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


class Collecting(cuttable.Body):
    """Adds up the states, as a model that returns its hidden states does."""

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        self.states: list[torch.Tensor] = []
        result = super().forward(tokens, mask)
        states, self.states = self.states, []
        return result + sum(states[:-1])

    def between(self, number: int, x: torch.Tensor) -> torch.Tensor:
        self.states.append(x)
        return x


class Skipping(cuttable.Body):
    """Adds the words behind the blocks once more."""

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return super().forward(tokens, mask) + self.place[:, : tokens.shape[1]] + self.word(tokens)


class Dropping(cuttable.Body):
    """Leaves a block out at random, as layerdrop does."""

    dropped = False

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        blocks = self.blocks
        try:
            self.blocks = nn.ModuleList(blocks[:-1]) if self.dropped else blocks
            return super().forward(tokens, mask)
        finally:
            self.blocks = blocks


class Sharing(cuttable.Body):
    """Calls its first block twice."""

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        x = super().forward(tokens, mask)
        return self.blocks[0](x, mask=None, turns=(x, x), scale=0.1)


class Stray(cuttable.Block):
    def forward(self, x: torch.Tensor, **others: Any) -> torch.Tensor:
        return super().forward(x, **others) + self.word[0].weight[:1]


class Straying(cuttable.Body):
    """Its blocks use the words without containing them."""

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.blocks = nn.ModuleList(Stray() for _ in range(blocks))
        for block in self.blocks:
            block.word = [self.word]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Scaling, r"block 1 does not get what block 0 returns: the model's forward does something in between"),
        (Normed, r"calls a LayerNorm, which has parameters, between the blocks of body.blocks"),
        (Collecting, r"do not compute what it computes: the output has other bits. Its forward uses more than what the last block"),
        (Sharing, r"does not call each block of body.blocks once, in order, but 0, 1, 2, 0"),
        (Straying, r"body.blocks.0 uses body.word.weight, which lies outside of it"),
    ],
)
def test_what_the_layers_would_not_compute_is_refused(kind: type[cuttable.Body], reason: str):
    with pytest.raises(TrainerError, match=reason + r".*Trainer\(\[model\], \.\.\.\).*job\.prepare"):
        layers(model(kind), example=BATCH)


def test_what_runs_before_and_behind_the_blocks_is_in_both_layers():
    found = layers(model(Skipping), example=BATCH)
    assert "body.word.weight" in dict(found[-1].named_parameters())
    assert "body._own.place" in dict(found[-1].named_parameters())


def test_a_model_without_one_body_is_refused():
    with pytest.raises(TrainerError, match=r"Linear cannot be cut into layers: it has no nn\.ModuleList of blocks"):
        layers(nn.Linear(2, 2), example=torch.ones(1, 2))
    two = nn.Module()
    two.encoder, two.decoder = (nn.ModuleList(nn.Linear(4, 4) for _ in range(3)) for _ in range(2))
    with pytest.raises(TrainerError, match=r"two lists of blocks, encoder and decoder"):
        layers(two, example=torch.ones(1, 4))
    with pytest.raises(TrainerError, match=r"has one block only"):
        layers(model(blocks=1), example=BATCH)
    with pytest.raises(TrainerError, match=r"elastic\.layers\(Causal\) needs an example"):
        layers(model())
    with pytest.raises(TrainerError, match=r"needs an nn\.Module, not a list"):
        cut([], BATCH)  # pyright: ignore[reportArgumentType]


def test_a_micro_batch_that_takes_another_way_is_refused():
    whole = model(Dropping)
    found = layers(whole, example=BATCH)
    Dropping.dropped = True
    try:
        with pytest.raises(TrainerError, match=r"calls 2 of its 3 blocks.*layerdrop"):
            found(BATCH)
    finally:
        Dropping.dropped = False
    assert all("forward" not in vars(block) for block in whole.body.blocks)
    assert found(BATCH)["logits"].requires_grad
