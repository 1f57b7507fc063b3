"""The registry of formats: how each is recognised, opened and written. Modules are imported when they are needed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from elastic.checkpoint.convert.output import ConversionProgress
from elastic.checkpoint.convert.rules import Rules
from elastic.checkpoint.objects import Location
from elastic.checkpoint.slices import Slicing
from elastic.checkpoint.state import PARAM, Source
from elastic.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One format. `recognise`, `opens` and `writes` are `module:function`; None: not supported.

    recognise(path) -> the reason why it is one, or None. opens(path, trust_pickle=, rules=) -> Source, with only the options in `options`.
    writes(source, path, max_memory=, progress=, and slicings= if `slices`). weights_only: the format cannot hold optimizer states, groups
    and extra values.
    """

    name: str
    recognise: str
    opens: str | None
    writes: str | None = None
    options: frozenset[str] = frozenset()
    weights_only: bool = False
    slices: bool = False
    looks: str = ""


_PICKLED = frozenset({"trust_pickle", "rules"})
_HERE = "elastic.checkpoint.convert"

FORMATS = {
    entry.name: entry
    for entry in (
        Format(
            name="elastic",
            recognise=f"{_HERE}.elastic_format:recognise",
            opens=f"{_HERE}.elastic_format:open_elastic",
            writes=f"{_HERE}.elastic_format:write_elastic",
            slices=True,
            looks="manifest.json, or step-*/manifest.json",
        ),
        Format(
            name="megatron",
            recognise=f"{_HERE}.megatron:recognise",
            opens=f"{_HERE}.megatron:open_megatron",
            options=_PICKLED,
            looks="mp_rank_*/model_optim_rng.pt",
        ),
        Format(
            name="megatron-dist",
            recognise=f"{_HERE}.megatron_dist:recognise",
            opens=f"{_HERE}.megatron_dist:open_torch_dist",
            options=_PICKLED,
            looks=".metadata, common.pt and metadata.json of Megatron",
        ),
        Format(
            name="dcp",
            recognise=f"{_HERE}.dcp:recognise",
            opens=f"{_HERE}.dcp:open_dcp",
            writes=f"{_HERE}.dcp_write:write_dcp",
            options=_PICKLED,
            looks=".metadata",
        ),
        Format(
            name="deepspeed-universal",
            recognise=f"{_HERE}.deepspeed_formats:recognise_universal",
            opens=f"{_HERE}.deepspeed_formats:open_deepspeed",
            writes=f"{_HERE}.deepspeed_formats:write_universal",
            options=_PICKLED,
            looks="zero/*/fp32.pt",
        ),
        Format(
            name="deepspeed",
            recognise=f"{_HERE}.deepspeed_formats:recognise_zero",
            opens=f"{_HERE}.deepspeed_formats:open_deepspeed",
            options=_PICKLED,
            looks="mp_rank_*_model_states.pt, *_optim_states.pt",
        ),
        Format(
            name="accelerate",
            recognise=f"{_HERE}.accelerate:recognise",
            opens=f"{_HERE}.accelerate:open_accelerate",
            options=_PICKLED,
            looks="random_states_*.pkl and weights, or pytorch_model_fsdp_0",
        ),
        Format(
            name="trainer",
            recognise=f"{_HERE}.trainer:recognise",
            opens=f"{_HERE}.trainer:open_trainer",
            options=_PICKLED,
            looks="optimizer.pt or optimizer.bin, and weights",
        ),
        Format(
            name="hf",
            recognise=f"{_HERE}.hf:recognise",
            opens=f"{_HERE}.hf:open_hf",
            writes=f"{_HERE}.hf:write_hf",
            options=_PICKLED,
            weights_only=True,
            looks="model.safetensors, pytorch_model.bin, their indexes, or adapter_model.safetensors",
        ),
        Format(
            name="torch",
            recognise=f"{_HERE}.torch_save:recognise",
            opens=f"{_HERE}.torch_save:open_torch",
            writes=f"{_HERE}.torch_save:write_torch",
            options=_PICKLED,
            looks="a file of torch.save",
        ),
    )
}
"""Formats in the order in which they are tried: our directories also look like Hugging Face's, Megatron's also like DCP's."""

TARGETS = tuple(name for name, entry in FORMATS.items() if entry.writes)


def function(reference: str, what: str) -> Callable[..., Any]:
    """Imports the function that `module:function` names. Raises CheckpointError if this installation lacks the module."""
    module, _, name = reference.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise CheckpointError(f"this installation cannot {what}: {error}") from error


def format_of(name: str) -> Format:
    """Returns the format called `name`. Raises CheckpointError."""
    if name not in FORMATS:
        raise CheckpointError(f"there is no format {name!r}; the formats are {', '.join(FORMATS)}")
    return FORMATS[name]


def open_source(path: Location, name: str, *, trust_pickle: bool = False, rules: Rules | None = None) -> Source:
    """Opens the checkpoint at `path` in a format. Raises CheckpointError."""
    entry = format_of(name)
    if entry.opens is None:
        raise CheckpointError(f"{name} cannot be read")
    options = {"trust_pickle": trust_pickle, "rules": rules or Rules()}
    return function(entry.opens, f"read {name}")(path, **{key: value for key, value in options.items() if key in entry.options})


def write_target(
    source: Source,
    path: Location,
    name: str,
    *,
    max_memory: int,
    progress: ConversionProgress,
    slicings: Mapping[tuple[str, str], Slicing] | None = None,
) -> None:
    """Writes a source in a format; `max_memory` in bytes. Raises CheckpointError, and leaves nothing at `path` then.

    `slicings`, by name and state: the tensors to keep as slices, in a format that can hold them.
    """
    entry = format_of(name)
    if entry.writes is None:
        raise CheckpointError(f"{name} can be read, but not written; targets are {', '.join(TARGETS)}")
    if slicings and not entry.slices:
        raise CheckpointError(f"{name} cannot hold tensor-parallel slices")
    options = {"slicings": slicings} if slicings else {}
    function(entry.writes, f"write {name}")(source, path, max_memory=max_memory, progress=progress, **options)


def kept(name: str, state: str) -> bool:
    """Returns whether a format can hold a state of a tensor."""
    return state == PARAM or not format_of(name).weights_only
