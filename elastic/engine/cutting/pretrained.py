"""What the runtime knows of `transformers` and peft: whether a model is one of theirs, and an example of its input.

Neither is imported: a model can only be one of theirs if the user's code has imported them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

_TOKENS, _SAMPLES = 8, 2


def is_pretrained(model: object) -> bool:
    """Returns whether this is a model of transformers, also with adapters of peft."""
    for module, name in (("transformers", "PreTrainedModel"), ("peft", "PeftModel")):
        kind = getattr(sys.modules.get(module), name, None)
        if isinstance(kind, type) and isinstance(model, kind):
            return True
    return False


def example(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """Returns a small input for a model of transformers that takes token ids or images; None for any other model."""
    if not is_pretrained(model):
        return None
    config: Any = getattr(model, "config", None)
    kind = getattr(model, "main_input_name", None) or getattr(getattr(model, "base_model", None), "main_input_name", None)
    if kind == "input_ids":
        return _tokens(config)
    return _image(config) if kind == "pixel_values" else None


def _tokens(config: Any) -> dict[str, torch.Tensor] | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    words = getattr(text, "vocab_size", None)
    if not isinstance(words, int):
        return None
    longest = getattr(text, "max_position_embeddings", None)
    length = min(_TOKENS, longest) if isinstance(longest, int) else _TOKENS
    places = torch.arange(_SAMPLES * length).reshape(_SAMPLES, length)
    mask = torch.tensor([[1] * length, [1] * (length - length // 4) + [0] * (length // 4)])  # padding: the forward then makes a mask
    return {"input_ids": 1 + places % max(1, words - 1), "attention_mask": mask}


def _image(config: Any) -> dict[str, torch.Tensor] | None:
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if size is None or channels is None:
        return None
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    pixels = torch.arange(_SAMPLES * channels * height * width).reshape(_SAMPLES, channels, height, width)
    return {"pixel_values": torch.sin(pixels.float())}
