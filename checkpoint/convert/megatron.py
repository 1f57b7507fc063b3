"""Reads Megatron-LM's own checkpoints: `iter_*/mp_rank_TT[_PPP]/model_optim_rng.pt`, a file of `torch.save` per model-parallel rank.

From Megatron-LM's `megatron/training/checkpointing.py` (`get_checkpoint_name`, `generate_state_dict`): `model` (`model0`, `model1`, ...
if a pipeline stage has several chunks) is the rank's part of the model, with layers numbered from 0; `optimizer` is the state of
Megatron-Core's `Float16OptimizerWithFloat16Params` or `FP32Optimizer`. Chunk c of stage p is the (c x stages + p)-th run of layers.
The states of a distributed optimizer are in another file, without names, and are not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from elastic.checkpoint.convert.megatron_optimizer import RankOptimizer, contents_of, merge_groups, read_rank
from elastic.checkpoint.convert.megatron_shards import gpt, joined, rule_for
from elastic.checkpoint.convert.nested import Nested
from elastic.checkpoint.convert.rules import PRESETS, Rules, ShardRule
from elastic.checkpoint.pickles import Archive, Opaque, load_archive, plain
from elastic.checkpoint.state import PARAM
from elastic.checkpoint.stored import Files, ReadableTensor, is_tensor
from elastic.errors import CheckpointError

LATEST = "latest_checkpointed_iteration.txt"
_RANK = re.compile(r"mp_rank_(\d\d)(?:_(\d{3}))?")
_FILE = "model_optim_rng.pt"
_DISTRIBUTED = "distrib_optim.pt"
_LAYER = re.compile(r"(.*\blayers\.)(\d+)(\..*)")
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"

FusedParts = list[ReadableTensor]
"""Each tensor-parallel rank's part of a tensor."""


def folder_of(path: Path) -> Path:
    """Returns the directory of an iteration: `path`, or the one in it that `latest_checkpointed_iteration.txt` names."""
    if not (path / LATEST).is_file():
        return path
    latest = (path / LATEST).read_text(errors="replace").strip()
    folder = path / (f"iter_{int(latest):07d}" if latest.isascii() and latest.isdigit() else "release")
    return folder if folder.is_dir() else path


def recognise(path: Path) -> str | None:
    """Returns why a path is such a checkpoint; None if it is not."""
    found = sorted(folder_of(path).glob(f"mp_rank_*/{_FILE}")) if path.is_dir() else []
    return f"it has a file {found[0].relative_to(path)}" if found else None


def namespace(value: Any) -> dict[str, Any]:
    """Returns Megatron's `args` as a dict, from a namespace or a dict."""
    held = value.state if isinstance(value, Opaque) else getattr(value, "__dict__", value)
    return dict(held) if isinstance(held, Mapping) else {}


def shards(rules: Rules, args: Mapping[str, Any]) -> Sequence[ShardRule]:
    """Returns the user's rules, then those of the preset."""
    return (*rules.shards, *(gpt(args) if rules.preset == PRESETS[0] else ()))


class _Ranks:
    """The files by pipeline stage and tensor-parallel rank. Raises CheckpointError if one is missing."""

    def __init__(self, folder: Path, files: Files, trust: bool) -> None:
        self.folder, self.archives = folder, {}
        for path in sorted(folder.glob(f"mp_rank_*/{_FILE}")):
            match = _RANK.fullmatch(path.parent.name)
            if match is None:
                raise CheckpointError(f"{path.parent}: only tensor-parallel and pipeline ranks are read, not experts")
            self.archives[int(match[2] or 0), int(match[1])] = Archive(path, files=files)
        self.stages, self.tensor = (1 + max(key[at] for key in self.archives) for at in (0, 1))
        missing = {(stage, rank) for stage in range(self.stages) for rank in range(self.tensor)} - set(self.archives)
        if missing:
            raise CheckpointError(f"{folder}: the file of pipeline stage {min(missing)[0]}, tensor rank {min(missing)[1]} is missing")
        self.states = {key: load_archive(archive, trusted=trust) for key, archive in self.archives.items()}
        self.args = namespace(self.states[0, 0].get("args"))
        for key, degree in (("tensor", self.tensor), ("pipeline", self.stages)):
            listed = self.args.get(f"{key}_model_parallel_size", degree)
            if listed != degree:
                raise CheckpointError(f"{folder}: its args list {listed} {key}-parallel ranks, but it has files of {degree}")
        if (self.args.get("expert_model_parallel_size") or 1) > 1:
            raise CheckpointError(f"{folder}: by its args, experts are divided over ranks, which is not read")

    def chunks(self, stage: int) -> list[str]:
        """Returns the keys of a stage's parts of the model."""
        state = self.states[stage, 0]
        numbered = [f"model{index}" for index in range(len(state)) if f"model{index}" in state]
        if not numbered and "model" not in state:
            raise CheckpointError(f"{self.archives[stage, 0].where}: it has no model")
        return numbered or ["model"]

    def verify(self) -> str:
        """Reads all files, and returns the result of their checksums, in words."""
        sums = [archive.verify() for archive in self.archives.values()]
        return f"{len(sums)} files read; CRC-32 of {sum(a for a, _ in sums)} bytes agree; {sum(b for _, b in sums)} bytes have none"


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, ReadableTensor]:
    """Returns the tensors of nested dicts, in order, by names with dots."""
    found: dict[str, ReadableTensor] = {}
    for key, item in value.items():
        if is_tensor(item):
            found[f"{prefix}{key}"] = item
        elif isinstance(item, Mapping):
            found |= _flat(item, f"{prefix}{key}.")
    return found


def _global_names(ranks: _Ranks) -> dict[tuple[int, str], dict[str, str]]:
    """Maps, by stage and chunk, a rank's names to names in the whole model. Raises CheckpointError if layers are missing."""
    keys = [(stage, key) for stage in range(ranks.stages) for key in ranks.chunks(stage)]
    keys.sort(key=lambda one: (ranks.chunks(one[0]).index(one[1]), one[0]))
    named: dict[tuple[int, str], dict[str, str]] = {}
    first = 0
    for stage, key in keys:
        names = list(_flat(ranks.states[stage, 0][key]))
        local = {int(match[2]) for name in names if (match := _LAYER.fullmatch(name))}
        if local != set(range(len(local))):
            raise CheckpointError(f"{ranks.archives[stage, 0].where}: {key} has layers {sorted(local)}")
        named[stage, key] = {
            name: f"{match[1]}{int(match[2]) + first}{match[3]}" if (match := _LAYER.fullmatch(name)) else name for name in names
        }
        first += len(local)
    listed = ranks.args.get("num_layers", first)
    if listed != first:
        raise CheckpointError(f"{ranks.folder}: its args list {listed} layers, but its files hold {first}")
    return named


def _read(ranks: _Ranks, rules: Rules) -> tuple[dict[tuple[str, str], FusedParts], list[RankOptimizer]]:
    """Returns the parts of all tensor-parallel ranks by name and state, and each rank's optimizer."""
    named = _global_names(ranks)
    parts: dict[tuple[str, str], Any] = {}
    optimizers: list[RankOptimizer] = []
    for (stage, rank), state in sorted(ranks.states.items()):
        model: dict[str, ReadableTensor] = {}
        for key in ranks.chunks(stage):
            held = _flat(state.get(key) or {})
            if list(held) != list(named[stage, key]):
                raise CheckpointError(f"{ranks.archives[stage, rank].where}: the tensors of {key} differ from those of tensor rank 0")
            model |= {named[stage, key][name]: value for name, value in held.items()}
        optimizer = read_rank(state.get("optimizer"), model, rules, ranks.archives[stage, rank].where)
        states = {(name, PARAM): value for name, value in model.items()} | optimizer.tensors
        for (name, kind), value in states.items():
            if not rules.drops(name) and not (name == OUTPUT and _is_tied(ranks, stage)):
                parts.setdefault((name, kind), []).append(value)
        optimizers.append(optimizer)
    return parts, optimizers


def _is_tied(ranks: _Ranks, stage: int) -> bool:
    """Returns whether a stage's output layer is a copy of the first stage's embedding."""
    return stage > 0 and ranks.args.get("untie_embeddings_and_output_weights") is False


def open_megatron(path: Path, *, trust_pickle: bool = False, rules: Rules | None = None) -> Nested:
    """Opens a checkpoint, or the one that `latest_checkpointed_iteration.txt` names. Raises CheckpointError."""
    files, rules, folder = Files(), rules or Rules(), folder_of(path)
    try:
        ranks = _Ranks(folder, files, trust_pickle)
        first = ranks.states[0, 0]
        if any(folder.glob(f"mp_rank_*/{_DISTRIBUTED}")) and not rules.drops("optimizer"):
            raise CheckpointError(
                f"{folder}: the optimizer's states are in {_DISTRIBUTED}, without names, and cannot be read: save it as torch_dist, or "
                'leave them out by the rule drop = ["optimizer"]'
            )
        parts, optimizers = _read(ranks, rules)
        layout = shards(rules, ranks.args)
        tensors = {(name, kind): joined(f"{name} {kind}", held, rule_for(name, layout)) for (name, kind), held in parts.items()}
    except CheckpointError:
        files.close()
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        files.close()
        raise CheckpointError(f"{folder}: its files do not have Megatron-LM's structure: {error}") from error
    tied = OUTPUT in _flat(ranks.states[ranks.stages - 1, 0][ranks.chunks(ranks.stages - 1)[-1]]) and _is_tied(ranks, ranks.stages - 1)
    groups, scalars = merge_groups(optimizers)
    contents = contents_of(tensors, groups, scalars, ties={OUTPUT: EMBEDDING} if tied else {}, extra=_extra(first), rules=rules)
    copies = [(name, held) for (name, _), held in parts.items() if rule_for(name, layout).dim is None]

    def check() -> str:
        return f"{ranks.verify()}; {_agree(copies)} copies agree"

    return Nested(format="megatron", contents=contents, tensors=tensors, files=files, check=check)


def _agree(copies: Sequence[tuple[str, Sequence[ReadableTensor]]]) -> int:
    """Compares the ranks' copies of whole tensors, and returns their number. Raises CheckpointError with one that differs."""
    for name, held in copies:
        whole = [part.run(0, torch.Size(part.spec.shape).numel()) for part in held]
        if any(not torch.equal(whole[0].view(torch.uint8), other.view(torch.uint8)) for other in whole[1:]):
            raise CheckpointError(f"tensor-parallel ranks hold different values of {name}, which every rank should have whole")
    return sum(len(held) for _, held in copies)


def _extra(state: Mapping[str, Any]) -> dict[str, Any]:
    dropped: list[str] = []
    skipped = ("optimizer", "args", "rng_state")
    kept = {key: plain(value, dropped) for key, value in state.items() if key not in skipped and not re.fullmatch(r"model\d*", key)}
    args = plain(namespace(state.get("args")), dropped)
    return {"step": state.get("iteration"), "megatron": {**kept, "args": args, "not_read": dropped}}
