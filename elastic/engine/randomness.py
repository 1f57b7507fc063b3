"""Randomness keyed by where it is used, so that it does not depend on who runs it.

torch's CPU `manual_seed` keeps only 32 bits of a seed, so the *whole* Mersenne Twister state of its default generator is
written: a SHAKE-256 expansion of the key. Python's and NumPy's generators take all 256 bits of the same hash as a seed.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch

_WORDS = 624
# torch's serialized CPU generator (CPUGeneratorImplStateLegacy): u64 seed, i32 left, i32 seeded, u64 next, u64 state[624], cached normals.
_LEFT, _STATE = 8, 24


def _template() -> np.ndarray:
    state = np.zeros_like(torch.default_generator.get_state().numpy())
    state[_LEFT : _LEFT + 8].view(np.int32)[:] = 1  # one draw left, then the state is refilled; seeded
    return state


_TEMPLATE = _template()


def expand(*parts: int | str) -> np.ndarray:
    """The key's 624 uint32 words of generator state."""
    material = "/".join(str(part) for part in parts).encode()
    return np.frombuffer(hashlib.shake_256(material).digest(4 * _WORDS), dtype="<u4")


def seed_all(*parts: int | str) -> None:
    """Puts the default generators of torch, NumPy and Python into the state named by the key."""
    words = expand(*parts)
    state = _TEMPLATE.copy()
    state[_STATE : _STATE + 8 * _WORDS].view("<u8")[:] = words
    torch.default_generator.set_state(torch.from_numpy(state))
    seed = words[:8]
    np.random.seed(seed)
    random.seed(int.from_bytes(seed.tobytes(), "little"))
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(int.from_bytes(seed[:2].tobytes(), "little"))
