"""Compares saving and loading with plain sequential writes and reads of the same bytes, and with torch's distributed checkpoint.

All sides alternate in one process, in one directory of one disk. Every save ends with an fsync (torch's writer has `sync_files=True` by
default). Every load fills new tensors, from files in the page cache and (`cold`) from the disk. Prints one JSON object with the medians of
the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from report import write_json
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from elastic.checkpoint.commit import save
from elastic.checkpoint.directory import newest
from elastic.checkpoint.state import PARAM, Contents, Spec
from elastic.checkpoint.store import LocalStore
from elastic.checkpoint.writer import TensorRun
from elastic.memory.tensors import Landing, bytes_of

_ROWS = 1024


def state_of(megabytes: int) -> dict[tuple[str, str], torch.Tensor]:
    """Returns parameters and Adam's two states, float32, in matrices of 4 MiB."""
    count = max(1, megabytes // 12)
    generator = torch.Generator().manual_seed(0)
    keys = [(f"layers.{number}.weight", state) for number in range(count) for state in (PARAM, "exp_avg", "exp_avg_sq")]
    return {key: torch.randn(_ROWS, _ROWS, generator=generator) for key in keys}


def contents_of(state: dict[tuple[str, str], torch.Tensor]) -> Contents:
    """Returns the checkpoint contents: shape and dtype of each state."""
    tensors: dict[str, dict[str, Spec]] = {}
    for name, kind in state:
        tensors.setdefault(name, {})[kind] = Spec(shape=(_ROWS, _ROWS), dtype="float32")
    return Contents(tensors=tensors)


class Sides:
    """The sides of the comparison. Each method does one save or load in `root`."""

    def __init__(self, root: Path, state: dict[tuple[str, str], torch.Tensor]) -> None:
        self._root, self._state = root, state
        self._contents = contents_of(state)
        self._runs: list[TensorRun] = [(name, kind, 0, tensor) for (name, kind), tensor in state.items()]
        self._flat = {f"{name}/{kind}": tensor for (name, kind), tensor in state.items()}

    def ours_save(self) -> None:
        save(LocalStore(self._root / "ours"), self._contents, self._runs, step=1)

    def ours_load(self) -> dict[tuple[str, str], torch.Tensor]:
        source = newest(LocalStore(self._root / "ours"))
        assert source is not None
        loaded = {key: torch.empty_like(tensor) for key, tensor in self._state.items()}
        for key, tensor in loaded.items():
            source.read_into(*key, 0, tensor.view(-1))
        source.close()
        return loaded

    def plain_save(self) -> None:
        descriptor = os.open(self._root / "plain", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for tensor in self._state.values():
            os.write(descriptor, bytes_of(tensor).data)
        os.fsync(descriptor)
        os.close(descriptor)

    def plain_load(self) -> None:
        descriptor = os.open(self._root / "plain", os.O_RDONLY)
        kept: list[torch.Tensor] = []
        for tensor in self._state.values():
            kept.append(torch.empty_like(tensor))
            os.readv(descriptor, [Landing(kept[-1]).bytes.data])
        os.close(descriptor)

    def dcp_save(self) -> None:
        dcp_save(self._flat, storage_writer=FileSystemWriter(self._root / "dcp", single_file_per_rank=True, sync_files=True))

    def dcp_load(self) -> None:
        into = {name: torch.empty_like(tensor) for name, tensor in self._flat.items()}
        dcp_load(into, checkpoint_id=self._root / "dcp")

    def torch_save(self) -> None:
        with open(self._root / "torch", "wb") as file:
            torch.save(self._flat, file)
            file.flush()
            os.fsync(file.fileno())

    def torch_load(self) -> None:
        torch.load(self._root / "torch", weights_only=True)

    def drop(self, side: str) -> None:
        """Drops the side's files from the page cache."""
        path = self._root / side
        for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    def forget(self, side: str) -> None:
        """Deletes the side's files, so that every save creates new ones."""
        path = self._root / side
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measured(megabytes: int, rounds: int, root: Path) -> dict[str, object]:
    """Runs the rounds and returns the figures: seconds and ratios."""
    state = state_of(megabytes)
    sides = Sides(root, state)
    times: dict[str, list[float]] = {}
    names = ["plain", "ours", "dcp", "torch"]
    for number in range(rounds):
        for name in names[number % 4 :] + names[: number % 4]:
            sides.forget(name)
            times.setdefault(f"{name}_save", []).append(_seconds(getattr(sides, f"{name}_save")))
            times.setdefault(f"{name}_load", []).append(_seconds(getattr(sides, f"{name}_load")))
            sides.drop(name)
            times.setdefault(f"{name}_cold_load", []).append(_seconds(getattr(sides, f"{name}_load")))
    loaded = sides.ours_load()
    if not all(torch.equal(loaded[key], tensor) for key, tensor in state.items()):
        raise SystemExit("what was loaded is not what was saved")
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "bytes": sum(tensor.numel() * 4 for tensor in state.values()),
        "rounds": rounds,
        "median_s": medians,
        "ratio_of_medians": {
            "save_to_plain": medians["ours_save"] / medians["plain_save"],
            "load_to_plain": medians["ours_load"] / medians["plain_load"],
            "cold_load_to_plain": medians["ours_cold_load"] / medians["plain_cold_load"],
            "save_to_dcp": medians["ours_save"] / medians["dcp_save"],
            "load_to_dcp": medians["ours_load"] / medians["dcp_load"],
            "cold_load_to_dcp": medians["ours_cold_load"] / medians["dcp_cold_load"],
        },
        "all_s": times,
    }


def main() -> None:
    """Prints the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None, help="write the object to this file too")
    parser.add_argument("--directory", type=Path, default=None, help="on the disk that is to be measured; a temporary one otherwise")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    with tempfile.TemporaryDirectory(prefix="checkpoint-benchmark-", dir=arguments.directory) as root:
        figures = measured(arguments.megabytes, arguments.rounds, Path(root))
    print(json.dumps(figures, indent=2))
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
