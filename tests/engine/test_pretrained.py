"""Tests that models of transformers, also with adapters of peft, are cut into layers with the bits of the model."""

from __future__ import annotations

from typing import Any

import pretrained_models as models
import pytest
import torch

from elastic.engine.cutting.check import check
from elastic.engine.cutting.layers import Layers, cut, layers
from elastic.engine.model import LayeredModel
from elastic.engine.numerics import Numerics
from elastic.errors import TrainerError

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.filterwarnings("ignore")]


def loss(output: Any, _: Any) -> torch.Tensor:
    return output.loss


def checked(model: Any, batch: dict[str, Any], **numerics: Any) -> Layers:
    found = cut(model, batch)
    check(LayeredModel(found), found, loss, Numerics(seed=5, **numerics), batch)
    return found


@pytest.mark.parametrize("kind", models.KINDS)
def test_each_kind_of_model(kind: str):
    model = models.build(kind)
    found = layers(model)
    assert len(found) == 2 + sum(type(layer).__name__ == "Block" for layer in found)
    assert list(found.state_dict()) == list(model.state_dict())
    own = [[name for name, _ in layer.named_parameters()] for layer in found]
    assert sum(map(len, own)) <= len(dict(model.named_parameters())) + 2  # tied ones, and no others, are in two layers
    assert model.config.to_dict() == models.build(kind).config.to_dict()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["gpt2", "llama-tied", "gemma3", "bert", "opt"])
def test_masks_labels_and_ways_of_attention(kind: str, attention: str):
    model = models.build(kind, attn_implementation=attention)
    found = checked(model, models.tokens(1))
    for padded in (False, True):  # without padding some models make no mask
        batch = models.tokens(2, samples=3, length=11, padded=padded)
        check(LayeredModel(found), found, loss, Numerics(seed=6), batch)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mixtral"])
def test_gradient_checkpointing_of_the_model_and_of_the_trainer(kind: str):
    model = models.build(kind)
    checked(model, models.tokens(1), checkpoint=lambda *_: True)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        checked(model, models.tokens(1))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "opt"])
def test_bfloat16(kind: str):
    checked(models.build(kind), models.tokens(1), autocast=torch.bfloat16)
    checked(models.build(kind).to(torch.bfloat16), models.tokens(1))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_adapters(kind: str):
    pytest.importorskip("peft", reason="needs peft")
    model = models.with_lora(models.build(kind), lora_dropout=0.1)
    found = checked(model, models.tokens(1))
    trained = [name for name, each in model.named_parameters() if each.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert len(layers(model)) == len(found)
    assert list(found.state_dict()) == list(model.state_dict())
    model.gradient_checkpointing_enable()
    checked(model, models.tokens(1))


def test_what_cannot_be_cut_names_the_module_and_the_way_out():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}
    shared = transformers.AlbertForMaskedLM(transformers.AlbertConfig(embedding_size=16, **sizes))
    with pytest.raises(TrainerError, match=r"albert.encoder.albert_layer_groups once, in order, but 0, 0, 0.*job\.prepare"):
        layers(shared)
    both = transformers.T5ForConditionalGeneration(transformers.T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8))
    with pytest.raises(TrainerError, match=r"two lists of blocks, decoder.block and encoder.block.*Trainer\(\[model\]"):
        layers(both)
    dropping = models.build("opt", layerdrop=0.9)
    with pytest.raises(TrainerError, match=r"layerdrop|once, in order"):
        layers(dropping)
    collecting = models.build("llama", output_hidden_states=True)
    with pytest.raises(TrainerError, match=r"output_hidden_states|cannot be cut"):
        layers(collecting)
