"""The loss of a language model as a sum over tokens, so that it does not depend on how lengths fall into micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from elastic.errors import TrainerError

IGNORED = -100
"""The label of a token that does not count: padding, a prompt."""


def token_loss(output: Any, micro_batch: Any, *, shift: bool = True) -> tuple[torch.Tensor, float]:
    """The loss for `Trainer` of a language model: the sum of the cross entropy over the labels that count, and their number.

    A step's loss is then the mean over all its tokens, however samples of different lengths fall into micro-batches, and whatever padding
    they need. `functools.partial(elastic.token_loss, shift=False)` is that of a masked language model.

    Args:
        output: the model's: logits (samples, tokens, words), or a mapping with `logits`, or with the model's own mean `loss`.
        micro_batch: a mapping with `labels` (samples, tokens), or a tuple or list with them in second place. Labels of -100 do not count.
        shift: each token's logits are for the label of the next one, as in causal models of `transformers`.

    Raises:
        TrainerError: if there are no labels.
    """
    labels = _labels(micro_batch)
    counted = labels[..., 1:] if shift else labels
    count = int((counted != IGNORED).sum())
    if isinstance(output, Mapping) and output.get("loss") is not None:
        return output["loss"] * count, float(count)
    logits = output["logits"] if isinstance(output, Mapping) else output
    logits = (logits[..., :-1, :] if shift else logits).flatten(0, -2).float()
    return functional.cross_entropy(logits, counted.flatten(), ignore_index=IGNORED, reduction="sum"), float(count)


def _labels(micro_batch: Any) -> torch.Tensor:
    if isinstance(micro_batch, Mapping):
        found = micro_batch.get("labels")
    else:
        found = micro_batch[1] if isinstance(micro_batch, tuple | list) and len(micro_batch) > 1 else None
    if not isinstance(found, torch.Tensor):
        raise TrainerError(
            f"elastic.token_loss finds no labels in the micro-batch, a {type(micro_batch).__name__}: let the data be dicts with a tensor "
            "`labels`, or pairs of inputs and labels; or give the Trainer a loss of your own that returns (sum, weight)"
        )
    return found
