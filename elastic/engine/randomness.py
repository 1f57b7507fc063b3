"""Randomness keyed by where it is used (seed, step, micro-batch, layer), so it does not depend on which worker runs it.

torch's CPU `manual_seed` uses only 32 bits of a seed. The runtime therefore writes the *whole* Mersenne Twister state of torch's default
generator: a SHAKE-256 expansion of the key. The generators of Python and NumPy are seeded with 256 bits of the same hash.

Between large kernels this code runs with cold caches and costs 0.5 ms a layer instead of 20 us. That is too much for Python's and NumPy's
generators, which few layers use. A step therefore starts without keying these two. If something drew from them during the step, the step
is computed again with all three keyed (`Generators`).
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from elastic.memory import device, raw
from elastic.memory.tensors import of_array

_WORDS = 624
# torch's serialized CPU generator (CPUGeneratorImplStateLegacy): u64 seed, i32 left, i32 seeded, u64 next, u64 state[624], cached normals.
_LEFT, _STATE = 8, 24

GeneratorKey = tuple[int | str, ...]


def _template() -> np.ndarray:
    state = raw.zeros(torch.default_generator.get_state().numel())
    raw.typed(state[_LEFT : _LEFT + 8], "i4")[:] = 1  # one draw left, then the state is refilled; seeded
    return state


_TEMPLATE = _template()


def expand(*key: int | str) -> np.ndarray:
    """Returns the 624 uint32 words of generator state for the key."""
    material = "/".join(str(part) for part in key).encode()
    return raw.typed(hashlib.shake_256(material).digest(4 * _WORDS), "<u4")


def torch_state(words: np.ndarray) -> torch.Tensor:
    """Returns the words as a state of torch's default generator."""
    state = _TEMPLATE.copy()
    raw.typed(state[_STATE : _STATE + 8 * _WORDS], "<u8")[:] = words
    return of_array(state)


def _seed_others(words: np.ndarray) -> None:
    seed = words[:8]
    np.random.seed(seed)
    random.seed(int.from_bytes(seed.tobytes(), "little"))


def seed_all(*key: int | str) -> None:
    """Seeds the default generators of torch (those of the CPU and of the device), NumPy and Python from the key."""
    words = expand(*key)
    torch.default_generator.set_state(torch_state(words))
    device.seed_generator(_device_seed(words))
    _seed_others(words)


def _device_seed(words: np.ndarray) -> int:
    """Returns the seed of a device's generator, which has 64 bits."""
    return int.from_bytes(words[:2].tobytes(), "little")


def torch_states() -> list[torch.Tensor]:
    """Returns the states of torch's default generators: the CPU's, and the device's if layers compute on one."""
    states = [torch.default_generator.get_state(), device.generator_state()]
    return [state for state in states if state is not None]


def states(*, others: bool = True) -> tuple[Any, ...]:
    """Returns the states of all default generators; without `others`, of torch's only."""
    return torch.default_generator.get_state(), device.generator_state(), *((np.random.get_state(), random.getstate()) if others else ())


def put_back(found: tuple[Any, ...]) -> None:
    """Restores what `states` returned."""
    of_torch, on_device, *others = found
    torch.default_generator.set_state(of_torch)
    if on_device is not None:
        device.set_generator_state(on_device)
    if others:
        np.random.set_state(others[0])
        random.setstate(others[1])


@contextmanager
def kept() -> Iterator[None]:
    """Restores the state of all default generators when the block ends."""
    found = states()
    try:
        yield
    finally:
        put_back(found)


def other_threads() -> str:
    """Returns a sentence to append to an error about random draws, naming the user's threads, which share the default generators."""
    names = [each.name for each in threading.enumerate() if each is not threading.current_thread() and not each.name.startswith("elastic-")]
    if not names:
        return ""
    return f". Or a thread of train_fn has drawn from torch's generator ({', '.join(names)}): give it a torch.Generator of its own"


class Generators:
    """Keys the generators before each layer of a step: torch's always, Python's and NumPy's only after something drew from them."""

    def __init__(self) -> None:
        self.all_keyed = False
        self._prepared: dict[GeneratorKey, torch.Tensor] = {}
        self._seeds: dict[GeneratorKey, int] = {}  # of the device's generator, if layers compute on one
        self._watched: Any = None

    def prepare(self, keys: Iterable[GeneratorKey]) -> None:
        """Computes the states of the next layers in one pass, while caches are warm; drops the states computed before."""
        words = {} if self.all_keyed else {key: expand(*key) for key in keys}
        self._prepared = {key: torch_state(each) for key, each in words.items()}
        if not device.on_host():
            self._seeds = {key: _device_seed(each) for key, each in words.items()}

    def enter(self, *key: int | str) -> None:
        """Puts the generators into the key's state."""
        state = self._prepared.get(key)
        if state is None or self.all_keyed:
            seed_all(*key)
        else:
            torch.default_generator.set_state(state)
            if key in self._seeds:
                device.seed_generator(self._seeds[key])

    def watch(self) -> None:
        """Notes the states of Python's and NumPy's generators, so that `drawn` detects later draws."""
        if not self.all_keyed:
            self._watched = self._others()

    def drawn(self) -> bool:
        """Returns whether something drew from Python's or NumPy's generator since `watch` while they were not keyed."""
        return not self.all_keyed and self._watched is not None and self._watched != self._others()

    @staticmethod
    def _others() -> Any:
        _, words, position, has_gauss, _ = np.random.get_state()
        return random.getstate(), words.tobytes(), position, has_gauss  # pyright: ignore[reportAttributeAccessIssue]
