"""Defects of the runtime that a device which is not the CPU must show: each is seeded in a worker, which then trains."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from elastic.engine import data, randomness
from elastic.memory import device, tensors
from elastic.memory.device import SideStream
from elastic.memory.tensors import Landing
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
    Landing.take = lambda self: self._tensor


def left_on_the_host() -> None:
    """Activations and gradients that were received stay on the host."""
    from elastic.engine import boundary

    boundary.of_bytes = tensors._of_host_bytes


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
    left_on_the_host,
    batches_on_the_host,
    unkeyed,
    read_in_place,
    wrong_device,
)


def train(job: Any, mutation: str) -> Any:
    """Trains with a defect."""
    next(each for each in MUTATIONS if each.__name__ == mutation)()
    return trainings.in_a_harness(job, "dropout")


def main() -> None:
    """Prints, for each defect, whether the job failed or ended with other bits."""
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
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
