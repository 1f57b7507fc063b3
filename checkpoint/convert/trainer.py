"""Reads directories of Hugging Face's Trainer (`checkpoint-*/`): weights, and the optimizer in a file of `torch.save`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from elastic.checkpoint.convert.hf import read_configs
from elastic.checkpoint.convert.hf import recognise as recognise_weights
from elastic.checkpoint.convert.hf_weights import load_weights
from elastic.checkpoint.convert.nested import Nested, interpret
from elastic.checkpoint.convert.numbered import Order
from elastic.checkpoint.convert.rules import Rules
from elastic.checkpoint.convert.torch_save import load_tree
from elastic.checkpoint.convert.tree import TreeParts
from elastic.checkpoint.stored import Files
from elastic.checkpoint.strict_json import loads
from elastic.errors import CheckpointError

OPTIMIZERS = ("optimizer.pt", "optimizer.bin")
SCHEDULERS = ("scheduler.pt", "scheduler.bin")
SCALERS = ("scaler.pt",)
STATE = "trainer_state.json"


def recognise(path: Path) -> str | None:
    """Returns why a path is such a directory; None if it is not."""
    if not path.is_dir() or recognise_weights(path) is None:
        return None
    return next((f"it has weights and a file {name}" for name in OPTIMIZERS if (path / name).is_file()), None)


def _order(tree: dict[str, Any], order: Order) -> Order:
    """Returns the rules' order, else that of the model that transformers builds from the configuration on `meta`, in Trainer's groups."""
    groups = tree.get("optimizer", {}).get("param_groups", ())
    if order.names or len(groups) != 2 or "trainer_state" not in tree or "config" not in tree:
        return order
    try:
        import transformers  # pyright: ignore[reportMissingImports]

        config = dict(tree["config"])
        kind = getattr(transformers, str((config.get("architectures") or [""])[0]))
        with torch.device("meta"):
            model = kind(transformers.AutoConfig.for_model(config.pop("model_type"), **config))
        decayed = set(transformers.Trainer.get_decay_parameter_names(None, model))
    except (ImportError, AttributeError, KeyError, TypeError, ValueError):
        return order
    names = [name for name, _ in model.named_parameters()]
    return replace(order, names=(tuple(n for n in names if n in decayed), tuple(n for n in names if n not in decayed)))


def read_optimizers(path: Path, files: Files, *, trust: bool) -> tuple[dict[str, Any], Callable[[], str]]:
    """Loads `optimizer`, `scheduler` and `scaler` if their files exist. Raises CheckpointError.

    Also returns a function that reads those files again, and returns the result in words.
    """
    tree: dict[str, Any] = {}
    archives = []
    for key, names in (("optimizer", OPTIMIZERS), ("scheduler", SCHEDULERS), ("scaler", SCALERS)):
        for name in names:
            if (path / name).is_file():
                tree[key], archive = load_tree(path / name, files, trust_pickle=trust)
                archives.append(archive)
    return tree, lambda: f"of the optimizer, CRC-32 of {sum(archive.verify()[0] for archive in archives)} bytes agree"


def read_state(path: Path, files: Files) -> dict[str, Any]:
    """Reads Trainer's progress, if its file exists."""
    where = path / STATE
    return {"trainer_state": loads(files.read(where, 0, files.size(where)), str(where), special_floats=True)} if where.is_file() else {}


def open_trainer(path: Path, *, trust_pickle: bool = False, rules: Rules | None = None) -> Nested:
    """Opens a directory. Raises CheckpointError; numbered parameters that transformers cannot identify need a rule with their names."""
    files, rules = Files(), rules or Rules()
    try:
        weights = load_weights(path, files, trust=trust_pickle, rules=rules)
        optimizers, check = read_optimizers(path, files, trust=trust_pickle)
        tree: dict[str, Any] = {**weights.tree, **read_configs(path, files), **optimizers, **read_state(path, files)}
        rules = replace(rules, order=_order(tree, replace(rules.order, by_definition=weights.ordered)))
        contents, tensors = interpret(tree, rules=rules, found=TreeParts(model=("model",), optimizer=("optimizer",)))
    except CheckpointError:
        files.close()
        raise
    contents = replace(contents, unread=(*weights.unread, *contents.unread))
    return Nested(format="trainer", contents=contents, tensors=tensors, files=files, check=lambda: f"{weights.check()}; {check()}")
