"""Joins the tensors that Megatron-LM divides over tensor-parallel ranks, by rules, or by a preset with the checkpoint's own arguments.

A tensor that ranks share is cut along one dimension. A fused one consists of parts that are cut separately: of gate and up projection,
rank r has the r-th part of the gates and then the r-th part of the ups. Widths are compared with the shapes in the files, and never taken
from them.

The preset `megatron-gpt` is Megatron-Core's GPTModel, as its `sharded_state_dict` states it (megatron-core 0.16, `core/tensor_parallel/
layers.py`, `core/transformer/mlp.py`, `core/transformer/attention.py`). Query, key and value are fused by query group (the queries of the
group, its key, its value), and ranks have whole groups: one part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from elastic.checkpoint.convert.rules import ShardRule
from elastic.checkpoint.slices import fused_slice
from elastic.checkpoint.state import Spec
from elastic.checkpoint.stored import Chunk, Chunked, ReadableTensor, Strided
from elastic.errors import CheckpointError
from elastic.layout.boxes import Box

GPT = "megatron-gpt"


def _argument(args: Mapping[str, Any], key: str) -> int:
    value = args.get(key)
    if type(value) is not int or value < 1:
        raise CheckpointError(
            f"the checkpoint's args have {key} = {value!r}, but the preset {GPT} needs a positive number: state the layout by [[shard]] "
            'rules, and preset = "none"'
        )
    return value


def gpt(args: Mapping[str, Any]) -> tuple[ShardRule, ...]:
    """Returns the rules of the preset. Raises CheckpointError with an argument that is missing."""
    heads, wide = _argument(args, "num_attention_heads"), _argument(args, "ffn_hidden_size")
    channels = args.get("kv_channels") or _argument(args, "hidden_size") // heads
    groups = _argument(args, "num_query_groups") if args.get("group_query_attention") else heads
    vocabulary = _argument(args, "padded_vocab_size")
    attention, mlp = r".*\.self_attention\.", r".*\.mlp\."
    return (
        ShardRule(pattern=r"(embedding\.word_embeddings|output_layer)\.weight", dim=0, parts=(vocabulary,)),
        ShardRule(pattern=rf"{attention}linear_qkv\.(weight|bias)", dim=0, parts=((heads + 2 * groups) * channels,)),
        ShardRule(pattern=rf"{attention}linear_proj\.weight", dim=1, parts=(heads * channels,)),
        ShardRule(pattern=rf"{mlp}linear_fc1\.(weight|bias)", dim=0, parts=(wide, wide) if args.get("swiglu") else (wide,)),
        ShardRule(pattern=rf"{mlp}linear_fc2\.weight", dim=1, parts=(wide,)),
        ShardRule(pattern=r"embedding\.position_embeddings\.weight"),
        ShardRule(pattern=rf"({attention}linear_proj|{mlp}linear_fc2)\.bias"),
        ShardRule(pattern=r"(.*[._])?(layernorm|layer_norm|norm)[._](weight|bias)"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftedChunk:
    """A part of one rank's tensor, as a chunk of the whole: it begins at index `shift` of the rank's tensor in dimension `dim`."""

    held: Strided
    dim: int
    shift: int

    def box(self, box: Box) -> torch.Tensor:
        """Reads a box of the part, in its shape."""
        offsets = tuple(offset + (self.shift if dim == self.dim else 0) for dim, offset in enumerate(box[0]))
        return self.held.box((offsets, box[1]))


def rule_for(name: str, rules: Sequence[ShardRule]) -> ShardRule:
    """Returns the first rule that matches a name. Raises CheckpointError if there is none."""
    found = next((rule for rule in rules if re.fullmatch(rule.pattern, name)), None)
    if found is None:
        raise CheckpointError(
            f"no rule states how {name} is divided over tensor-parallel ranks: add [[shard]] regex = {name!r}, with dim and parts, or "
            "without them if every rank has it whole; or drop it"
        )
    return found


def joined(name: str, held: Sequence[ReadableTensor], rule: ShardRule) -> ReadableTensor:
    """Returns the whole tensor from the ranks' parts, in order. Raises CheckpointError if they contradict the rule."""
    if len({part.spec for part in held}) > 1:
        raise CheckpointError(f"{name}: the tensor-parallel ranks hold different shapes: {[list(part.spec.shape) for part in held]}")
    spec, ranks = held[0].spec, len(held)
    if rule.dim is None:
        return held[0]
    if rule.dim >= len(spec.shape) or any(width % ranks for width in rule.parts) or sum(rule.parts) != spec.shape[rule.dim] * ranks:
        raise CheckpointError(
            f"{name}: {ranks} ranks hold {list(spec.shape)} each, which are not parts of widths {list(rule.parts)} in dimension {rule.dim}"
        )
    if ranks == 1:
        return held[0]
    whole = Spec(shape=(*spec.shape[: rule.dim], sum(rule.parts), *spec.shape[rule.dim + 1 :]), dtype=spec.dtype)
    widths = [[width // ranks] * ranks for width in rule.parts]
    chunks = [chunk for rank, part in enumerate(held) for chunk in _chunks(whole, part, rule.dim, widths, rank)]
    return Chunked(spec=whole, chunks=tuple(chunks))


def _chunks(whole: Spec, held: ReadableTensor, dim: int, widths: Sequence[Sequence[int]], rank: int) -> list[Chunk]:
    """Returns one rank's part as boxes of the whole."""
    if not isinstance(held, Strided):
        raise CheckpointError("a tensor that was loaded whole cannot be joined; files of torch before 1.6 are not read here")
    cuts = fused_slice(dim, widths, rank).cuts
    shifts = accumulate((stop - start for start, stop in cuts), initial=0)
    chunks: list[Chunk] = []
    for (start, stop), shift in zip(cuts, shifts, strict=False):
        offsets = tuple(start if at == dim else 0 for at in range(len(whole.shape)))
        sizes = tuple(stop - start if at == dim else extent for at, extent in enumerate(whole.shape))
        part = ShiftedChunk(held=held, dim=dim, shift=shift)
        chunks.append((offsets, sizes, lambda part=part: part))
    return chunks
