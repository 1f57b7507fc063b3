"""Defects of the runtime that a device which is not the CPU must show: each is seeded in a worker, which then trains.

python -m tests.device.mutations            seeds each, checks that it is found, and writes the table in docs/gpu.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from elastic.engine import data, randomness
from elastic.engine.tensor_links import StagedLinks
from elastic.memory import device, tensors
from elastic.memory.device import SideStream
from elastic.memory.staging import Staged, StagedLanding
from elastic.snapshot.host_copies import HostCopies
from tests.device import trainings


def no_wait_for_the_copy() -> None:
    """The copy of the state is not over when the next update writes to it."""
    HostCopies.settle = lambda self: None


def no_wait_for_the_computation() -> None:
    """The copy of the state begins before the update is done."""

    @contextmanager
    def at_once(self: SideStream) -> Iterator[None]:
        with self._stream:
            yield
        self._done = torch.Event(device=device.current())
        self._done.record(self._stream)

    SideStream.after_computation = at_once


def nothing_copied_up() -> None:
    """What links receive does not get to the device."""
    StagedLanding.take = lambda self: self._tensor


def sent_before_it_is_copied() -> None:
    """Links send what is not on the host yet."""
    Staged.bytes = lambda self: self._memory.numpy()


def no_wait_for_what_came() -> None:
    """The computation does not wait until what links received is on the device."""
    SideStream.before_computation = lambda self: None


def held_back() -> None:
    """A worker waits for others while it holds back what they wait for."""
    StagedLinks.push = lambda self: None


def left_on_the_host() -> None:
    """Activations and gradients that were received stay on the host."""
    from elastic.engine import boundary

    boundary.of_bytes = tensors.of_host_bytes


def batches_on_the_host() -> None:
    """Batches are not moved to the device."""
    data._moved = lambda value: value


def unkeyed() -> None:
    """The device's generator is not keyed."""
    randomness.device.seed_generator = lambda seed: None


def read_in_place() -> None:
    """The host reads a tensor's memory where it lies."""
    import ctypes

    def read(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach().contiguous()
        memory = ctypes.string_at(tensor.data_ptr(), tensor.nbytes)
        return torch.frombuffer(bytearray(memory), dtype=tensor.dtype).view(tensor.shape)

    tensors._on_host = read


def wrong_device() -> None:
    """New memory lies on the first device, whichever is the worker's."""
    first = torch.device("fake", 0)
    zeros = tensors.lasting

    def lasting(elements: int, dtype: torch.dtype) -> torch.Tensor:
        return zeros(elements, dtype).to(first)

    for module in ("model", "reduction", "shard", "zero"):
        __import__(f"elastic.engine.{module}", fromlist=["lasting"]).lasting = lasting


MUTATIONS: tuple[Callable[[], None], ...] = (
    no_wait_for_the_copy,
    no_wait_for_the_computation,
    nothing_copied_up,
    sent_before_it_is_copied,
    no_wait_for_what_came,
    held_back,
    left_on_the_host,
    batches_on_the_host,
    unkeyed,
    read_in_place,
    wrong_device,
)


FOUND = {
    "no_wait_for_the_copy": "without having waited",
    "no_wait_for_the_computation": "without having waited",
    "nothing_copied_up": "copies of the state differ",
    "sent_before_it_is_copied": "without having waited",
    "no_wait_for_what_came": "without having waited",
    "held_back": "the workers hang",
    "left_on_the_host": "same device",
    "batches_on_the_host": "same device",
    "unkeyed": "other bits",
    "read_in_place": "EOFError",
    "wrong_device": "same device",
}
"""What shows each defect: words of the error; `other bits` if the job ends, but not with the result; `EOFError` if a process ended."""

PATH = Path(__file__).parents[2] / "docs" / "gpu.md"
BEGIN, END = "<!-- mutations: python -m tests.device.mutations -->\n", "<!-- end of mutations -->\n"
_SHOWN = {"other bits": "the job ends with other bits", "EOFError": "SIGSEGV", "the workers hang": "the workers wait for ever"}


def table() -> str:
    """Returns the table of the documentation: each defect, and what shows it."""
    rows = [f"| {str(each.__doc__).rstrip('.')} | {_SHOWN.get(found := FOUND[each.__name__], f'error: {found}')} |" for each in MUTATIONS]
    return "\n".join(["| defect | shown by |", "|---|---|", *rows]) + "\n"


def written(text: str) -> str:
    """Returns the documentation with the table in it."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


def train(job: Any, mutation: str) -> Any:
    """Trains with a defect."""
    next(each for each in MUTATIONS if each.__name__ == mutation)()
    return trainings.in_a_harness(job, "dropout")


def seeded() -> dict[str, str]:
    """Returns, for each defect, how the job failed, or whether it ended with other bits."""
    sound, found = trainings.harness.run(trainings.in_a_harness, workers=2, stages=2, args=("dropout",)), {}
    trainings.harness.TIMEOUT_S = 60
    for mutation in MUTATIONS:
        if sys.argv[1:] and mutation.__name__ not in sys.argv[1:]:
            continue
        try:
            results = trainings.harness.run(train, workers=2, stages=2, args=(mutation.__name__,))
            found[mutation.__name__] = "equal" if results[0] == sound[0] else "other bits"
        except (trainings.harness.WorkerError, EOFError, AssertionError) as error:  # it raised, its process ended, or the others hang
            found[mutation.__name__] = f"{type(error).__name__}: {str(error)[:300]}"
    return found


def main() -> None:
    """Prints what `seeded` returns."""
    print(json.dumps(seeded(), indent=1))


def document() -> None:
    """Writes the table, if every defect is found. Raises SystemExit else."""
    found = seeded()
    if missed := {name: text for name, text in found.items() if FOUND[name] not in text}:
        raise SystemExit(f"not found: {json.dumps(missed, indent=1)}")
    PATH.write_text(written(PATH.read_text()))


if __name__ == "__main__":
    from tests.device import mutations  # workers import the defects from there

    mutations.document()
