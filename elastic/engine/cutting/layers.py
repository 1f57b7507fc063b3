"""`elastic.layers`: a whole model as a list of layers, with the names of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from elastic.engine import randomness
from elastic.engine.cutting import pretrained
from elastic.engine.cutting.body import body_of, refusal
from elastic.engine.cutting.check import check, some_loss
from elastic.engine.cutting.forwarding import Forwarding
from elastic.engine.cutting.parts import Block, First, Last, divide
from elastic.engine.cutting.tracing import trace
from elastic.engine.data import model_input
from elastic.engine.model import LayeredModel
from elastic.engine.numerics import Numerics
from elastic.engine.placement import place_model
from elastic.errors import TrainerError


class Layers(nn.Sequential):
    """The layers of `model`, which they share modules and parameters with. Its state_dict is the model's own.

    The first layer takes the model's input: a tensor, or a dict of its keyword arguments. The last one returns the model's output.
    """

    model: nn.Module

    def of(self, model: nn.Module) -> Layers:
        """Notes the model that the layers were cut from."""
        vars(self)["model"] = model  # not registered: its parameters have their names in the layers
        return self

    def state_dict(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """The model's own state_dict."""
        return self.model.state_dict(*arguments, **options)

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        """Loads a state_dict of the model's."""
        return self.model.load_state_dict(*arguments, **options)


def layers(model: nn.Module, example: Any = None) -> Layers:
    """Cuts a model into layers for `Trainer`: one before its blocks, its blocks, and one behind them.

    The blocks are the `nn.ModuleList` with most parameters. The model's forward must call each of them once, in order, with what the block
    before has returned and with other arguments that are tensors or constants. This holds for causal models of `transformers` (GPT-2,
    Llama, Qwen, Mistral, Gemma, Phi, OPT, GPT-NeoX), encoders such as BERT, and ViT; peft's adapters may be in them. The layers share the
    model's modules and parameters: an optimizer may have been made of either. They are compared with the model: output and gradients on the
    example must have the same bits.

    Args:
        model: the model, whole, on the CPU or on the job's device. `use_cache` of a model of transformers is off in training.
        example: a micro-batch as the model gets it: a tensor, a dict of keyword arguments, or a tuple or list of which it gets the first.
            A model of transformers that takes token ids or images needs none.

    Raises:
        TrainerError: if the model cannot be cut, with the module and the reason; it can still be trained as one layer.
    """
    if isinstance(model, Layers):
        return model
    if any(each.is_meta for each in model.parameters()):
        raise TrainerError(
            f"elastic.layers({type(model).__name__}) needs a model with values, but this one is on meta, as in a function that builds the "
            "Trainer's model: return the model itself there (a model of transformers is cut then), or a list of its layers"
        )
    place_model(model)
    given = pretrained.example(model) if example is None else example
    if given is None:
        raise TrainerError(
            f"elastic.layers({type(model).__name__}) needs an example, a micro-batch as the model gets it, to see what its forward does: "
            "elastic.layers(model, example=batch)"
        )
    found = cut(model, model_input(given))
    check(LayeredModel(found), found, some_loss, Numerics(seed=0), given)
    return found


def cut(model: nn.Module, inputs: Any) -> Layers:
    """Cuts a model as `layers` does, without comparing the layers with it."""
    if not isinstance(model, nn.Module):
        raise TrainerError(f"elastic.layers needs an nn.Module, not a {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise refusal(model, "it is compiled; cut the model before, and compile blocks by their own compile()")
    body = body_of(model)
    with torch.inference_mode(False):
        seen = trace(model, body, inputs)
    forwarding = Forwarding(model, body, seen.wiring, seen.last_output)
    first, last = First(forwarding, seen.wiring), Last(forwarding)
    divide(model, body, seen, first, last)
    forwarding.own(last.parameters())
    blocks = [Block(body.block_name(index), block, index, seen.wiring) for index, block in enumerate(body.blocks)]
    found = Layers(first, *blocks, last).of(model)
    found.train(model.training)
    _check_whole(model, found)
    return found


def as_layers(model: Any, load: Callable[[], Any]) -> Any:
    """Cuts a model of transformers, also with adapters of peft; `load` returns a micro-batch. Returns everything else as it is."""
    if not pretrained.is_pretrained(model):
        return model
    place_model(model)
    with randomness.kept():
        return cut(model, model_input(load()))


def uncut(model: Any) -> Any:
    """Returns the model that layers were cut from; everything else as it is."""
    return model.model if isinstance(model, Layers) else model


def _check_whole(model: nn.Module, found: Layers) -> None:
    own = {id(parameter) for parameter in found.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in own:
            raise refusal(model, f"its parameter {name} belongs to none of the layers")
