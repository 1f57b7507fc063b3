"""Reads the `*_model_states.pt` files of DeepSpeed: everything except the shards of the optimizer.

From DeepSpeed 0.19.8, `runtime/engine.py`: `_common_checkpoint_state` (the keys), `_get_ckpt_name` (the file names),
`_get_zero_param_shapes` (per group, or sub-group in ZeRO-3, in the order of the flat vector, which includes the round-robin order),
`_get_shared_params` (alias -> name, of rank 0). Stage 1 saves frozen parameters in `module` only, stage 3 as partitions of every rank.
A pipeline writes `module: None` and one `layer_NN-model_states.pt` per layer (`runtime/pipe/module.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastic.checkpoint.convert.deepspeed_pieces import PiecedTensor, cut
from elastic.checkpoint.pickles import load, plain
from elastic.checkpoint.stored import Files, is_tensor
from elastic.checkpoint.strict_json import loads
from elastic.errors import CheckpointError

_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_LAYER = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt|layer_(\d+)-model_states\.pt")
_NOT_EXTRA = frozenset(
    ("module", "optimizer", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params", "buffer_names")
)

OURS = "elastic"
"""The key in our Universal checkpoints for extra values of other formats, as JSON."""

Shapes = Sequence[Mapping[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """A directory to open. trusted: its pickles may be run. drops: whether a rule leaves out a name."""

    folder: Path
    trusted: bool
    drops: Callable[[str], bool]
    files: Files = field(default_factory=Files)

    def load(self, path: Path) -> Any:
        """Loads a file of the directory."""
        return load(path, trusted=self.trusted, files=self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The contents of the model files.

    shapes: per model-parallel rank, per group of the flat vectors. fixed: frozen parameters and buffers. extra: as in `Contents`.
    """

    shapes: Mapping[int, Shapes]
    fixed: Mapping[str, PiecedTensor]
    frozen: frozenset[str]
    buffers: frozenset[str]
    ties: Mapping[str, str]
    step: int | None
    extra: Mapping[str, Any]


def read_models(opening: Opening) -> Models:
    """Reads the model files of a checkpoint; `shapes` has dropped names too. Raises CheckpointError with file and reason."""
    folder = opening.folder
    files = model_files(folder)
    states = {key: opening.load(path) for key, path in files.items()}
    for key, state in states.items():
        if not isinstance(state, dict) or not isinstance(state.get("param_shapes"), list):
            raise CheckpointError(f"{files[key]}: it has no param_shapes, so it was saved without a ZeRO optimizer")
    first = states[min(states, key=lambda key: (key[1], key[0]))]
    refuse_tensor_parallel(folder, first, {mp for _, mp in states})
    shapes = {mp: [dict(group) for group in state["param_shapes"]] for (rank, mp), state in sorted(states.items()) if rank == 0}
    trained = {name for groups in shapes.values() for group in groups for name in group}
    fixed, frozen = _fixed(opening, states, trained)
    ties = {alias: name for state in states.values() for alias, name in (state.get("shared_params") or {}).items()}
    ties = {(name if alias in trained else alias): (alias if alias in trained else name) for alias, name in ties.items()}
    known = trained | set(fixed)
    return Models(
        shapes=shapes,
        fixed={name: pieces for name, pieces in fixed.items() if name not in ties},
        frozen=frozenset(frozen - set(ties)),
        buffers=frozenset(set(fixed) - frozen - set(ties)),
        ties={alias: name for alias, name in ties.items() if name in known},
        step=first["global_steps"] if isinstance(first.get("global_steps"), int) else None,
        extra=extra_of(first),
    )


def extra_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the other values of a file of model states, by key, for `Contents`; values of another format are restored as they were."""
    dropped: list[str] = []
    read = {key: plain(value, dropped) for key, value in state.items() if key not in _NOT_EXTRA}
    text = read.pop(OURS, None)
    own = {"deepspeed": {**read, "not_read": dropped} if dropped else read}
    if not isinstance(text, str):
        return own
    ours = loads(text.encode(), f"the value under the key {OURS}", special_floats=True)
    if not isinstance(ours, dict) or not isinstance(ours.get("extra"), dict) or "deepspeed" not in ours:
        raise CheckpointError(f"the value under the key {OURS} was not written by this program; drop the key, or convert again")
    return {**ours["extra"], **(own if ours["deepspeed"] else {})}


def model_files(folder: Path) -> dict[tuple[int, int], Path]:
    """Returns the model files by rank in the data-parallel group (0 if all hold the same) and model-parallel rank."""
    found: dict[tuple[int, int], Path] = {}
    for path in sorted(folder.glob("*mp_rank_*_model_states.pt")):
        if match := _MODEL.fullmatch(path.name):
            found.setdefault((int(match[1] or 0), int(match[2])), path)
    if (0, 0) not in found:
        raise CheckpointError(f"{folder}: it has no mp_rank_00_model_states.pt nor zero_pp_rank_0_mp_rank_00_model_states.pt")
    return found


def refuse_tensor_parallel(folder: Path, state: Mapping[str, Any], ranks: set[int]) -> None:
    """Raises CheckpointError if the ranks hold tensor-parallel slices, or some ranks are missing."""
    degrees = state.get("checkpoint_parallel_dimensions") or {}
    tensor = degrees.get("tp_degree") or (1 if state.get("module") is None else len(ranks))
    if tensor > 1:
        raise CheckpointError(f"{folder}: it was saved by {tensor} tensor-parallel ranks; slices of DeepSpeed are not read")
    if sorted(ranks) != list(range(len(ranks))):
        raise CheckpointError(f"{folder}: model states of a model-parallel rank are missing; found ranks {sorted(ranks)}")


def _fixed(opening: Opening, states: Mapping[tuple[int, int], Any], trained: set[str]) -> tuple[dict[str, PiecedTensor], set[str]]:
    """Returns frozen parameters and buffers, and the names of the frozen parameters."""
    folder = opening.folder
    found: dict[str, PiecedTensor] = {}
    frozen: set[str] = set()
    for (rank, mp), state in sorted(states.items()):
        buffers = set(state.get("buffer_names") or ())
        fragments = state.get("frozen_param_fragments") or {}
        if rank == 0:
            for name, shape in (state.get("frozen_param_shapes") or {}).items():
                if opening.drops(name):
                    continue
                held = [states[key]["frozen_param_fragments"][name] for key in sorted(states) if key[1] == mp]
                partitioned = tuple(held[0].spec.shape) != tuple(shape)
                found[name] = cut(f"{folder}: {name}", shape, held) if partitioned else PiecedTensor.whole(f"{folder}: {name}", held[0])
                frozen.add(name)
        for name, held in (state.get("module") or {}).items():
            if name in trained or name in found or name in fragments or not is_tensor(held) or opening.drops(name):
                continue
            if 0 in held.spec.shape and name not in buffers:
                continue  # an empty placeholder of a parameter that ZeRO-3 has partitioned
            found[name] = PiecedTensor.whole(f"{folder}: {name}", held)
            frozen |= {name} - buffers
    return found | _of_layers(opening, trained, set(found)), frozen


def _of_layers(opening: Opening, trained: set[str], found: set[str]) -> dict[str, PiecedTensor]:
    """Returns the tensors in a pipeline's layer files that are not trained parameters; a layer's names begin with its number."""
    layers: dict[str, PiecedTensor] = {}
    for path in sorted(opening.folder.glob("layer_*model_states.pt")):
        match = _LAYER.fullmatch(path.name)
        if match is None:
            raise CheckpointError(f"{path}: its name is not that of a DeepSpeed pipeline layer (experts are not read)")
        prefix = f"{int(match[1] or match[3])}."
        if not any(name.startswith(prefix) for name in trained):
            continue  # a layer of tied modules: its parameters are trained under `tied_modules.`
        for name, held in opening.load(path).items():
            if prefix + name not in trained | found and is_tensor(held) and not opening.drops(prefix + name):
                layers[prefix + name] = PiecedTensor.whole(f"{path}: {name}", held)
    return layers
