"""Directories of Hugging Face's Trainer (`checkpoint-*/`) and of Accelerate: weights, and the optimizer's `torch.save` file beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoint.convert.hf import load_weights, read_all, read_configs
from checkpoint.convert.hf import recognise as recognise_weights
from checkpoint.convert.nested import Nested, interpret
from checkpoint.convert.optimizer import Order
from checkpoint.convert.safetensors_file import strict_json
from checkpoint.convert.stored import Files
from checkpoint.convert.torch_save import load_tree
from checkpoint.convert.tree import Found
from elastic.errors import CheckpointError

OPTIMIZERS = ("optimizer.pt", "optimizer.bin")
SCHEDULERS = ("scheduler.pt", "scheduler.bin")
STATE = "trainer_state.json"


def recognise(path: Path) -> str | None:
    """Why a path is such a directory, None if it is not."""
    if not path.is_dir() or recognise_weights(path) is None:
        return None
    return next((f"it has weights and a file {name}" for name in OPTIMIZERS if (path / name).is_file()), None)


def open_trainer(path: Path, *, trust_pickle: bool = False, order: Order | None = None) -> Nested:
    """Opens a directory. Raises CheckpointError; for an optimizer of several groups a rule must say which parameters are in which."""
    files = Files()
    try:
        weights = load_weights(path, files)
        tree: dict[str, Any] = {"model": weights, **read_configs(path, files)}
        archives = []
        for key, names in (("optimizer", OPTIMIZERS), ("scheduler", SCHEDULERS)):
            for name in names:
                if (path / name).is_file():
                    tree[key], archive = load_tree(path / name, files, trust_pickle=trust_pickle)
                    archives.append(archive)
        if (path / STATE).is_file():
            tree["trainer_state"] = strict_json(files.read(path / STATE, 0, files.size(path / STATE)), str(path / STATE))
        contents, tensors = interpret(tree, order=order or Order(), found=Found(model=("model",), optimizer=("optimizer",)))
    except CheckpointError:
        files.close()
        raise

    def check() -> str:
        sums = [archive.verify() for archive in archives]
        return f"{read_all(weights)}; of the optimizer, CRC-32 of {sum(a for a, _ in sums)} bytes agree"

    return Nested(format="trainer", contents=contents, tensors=tensors, files=files, check=check)
