"""What must not change while a model trains, and is found if it does: buffers, frozen parameters, and parameters within a step.

Every worker has all buffers and frozen parameters as it built them: what one worker changes is not there on the others, in checkpoints, or
with whoever joins. Torch counts in-place changes; what it does not count (through `.data` or NumPy) is found by checksums, of a part at
each step. A buffer that is written with the values it had is not changed. One that is no part of the model's state may be a cache: it may
be made anew in another shape, and filled once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from elastic.engine.buffers import Running
from elastic.engine.partial import partial
from elastic.errors import TrainerError
from elastic.memory.digest import checksum
from elastic.memory.tensors import bytes_of, contiguous

PART_BYTES = 1 << 20
"""How much is compared at each step."""

_OUTSIDE = "keep what changes outside of the model that the Trainer gets (an averaged copy: trainer.average)"


@dataclass(slots=True, kw_only=True)
class _Watched:
    """One tensor: the object and its version when it was last seen, and its checksum where that was taken. `saved`: it is in state_dict."""

    tensor: torch.Tensor
    version: int
    frozen: bool
    saved: bool
    checksum: str | None = None
    filled: bool = False


class ChangeWatch:
    """Of one worker. What `running` knows may change, since the runtime applies it in order and moves it."""

    def __init__(self, root: nn.Module, running: Running, *, exact: bool) -> None:
        self._root, self._running, self._exact = root, running, exact
        self._parameters = {name: parameter for name, parameter in root.named_parameters() if parameter.requires_grad}
        self._before: list[int] = []
        self._watched: dict[str, _Watched] = {}
        self._warned: set[str] = set()
        self.renew()

    def renew(self) -> None:
        """Everything is as it should be now: it was built, or read from a checkpoint."""
        saved, may_change = saved_names(self._root), set(self._running.names)
        self._watched = {
            name: _Watched(tensor=each, version=each._version, frozen=True, saved=True)
            for name, each in self._root.named_parameters()
            if not each.requires_grad
        }
        for name, buffer in self._root.named_buffers():
            if name not in may_change:
                known = checksum(bytes_of(contiguous(buffer)))
                self._watched[name] = _Watched(tensor=buffer, version=buffer._version, frozen=False, saved=name in saved, checksum=known)
        self._turns = list(self._watched)

    def begin(self, step: int) -> None:
        """Before the first forward of a step. Raises TrainerError for what has changed since the last one."""
        self.untouched(step)
        for name in self._changed():
            kind = "frozen parameter" if self._watched[name].frozen else "buffer"
            self._complain(
                name,
                f"{kind} {self._where(name)} was changed between two steps, before step {step}: that is not in checkpoints, and workers "
                "that join do not have it",
                _OUTSIDE,
            )
        self._before = [parameter._version for parameter in self._parameters.values()]

    def untouched(self, step: int) -> None:
        """Raises TrainerError where somebody else has changed running statistics, which are about to be brought up to a step."""
        for name in self._running.touched():
            self._refuse(f"buffer {self._where(name)}, a running statistic, was changed between two steps, before step {step}", _OUTSIDE)

    def end(self, step: int) -> None:
        """Behind the last one, before anything of the step counts. Raises TrainerError for what the layers have changed."""
        now = [parameter._version for parameter in self._parameters.values()]
        if now != self._before:
            name = next(name for name, one, other in zip(self._parameters, self._before, now, strict=True) if one != other)
            self._refuse(
                f"parameter {self._where(name)} was changed in place by the forward of step {step}: other workers do not know of it, and "
                "neither does the optimizer",
                "leave out max_norm= and the like, or change trained parameters in trainer.after_step",
            )
        for name in [*self._changed(), *self._running.changed()]:
            self._complain(
                name,
                f"buffer {self._where(name)} was changed by the forward of step {step}: its values depend on which worker runs which "
                "micro-batches",
                "use BatchNorm, whose running statistics are applied in order, or a layer without state (LayerNorm, GroupNorm); without "
                "exactness (exact=False) the values of the worker with most micro-batches hold for all",
            )

    def _complain(self, name: str, what: str, advice: str) -> None:
        if self._exact:
            self._refuse(what, advice)
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(f"{what}: {advice}", stacklevel=2)

    @staticmethod
    def _refuse(what: str, advice: str) -> None:
        raise TrainerError(f"{what}: {advice}")

    def _where(self, name: str) -> str:
        return f"{name} of layer {self._running.layer_of(name)} ({type(self._running.owner(name)).__name__})"

    def _changed(self) -> list[str]:
        """The names of what has changed since this was last asked."""
        found = [name for name, watched in self._watched.items() if self._has_changed(name, watched)]
        return [*found, *self._compared(set(found))]

    def _has_changed(self, name: str, watched: _Watched) -> bool:
        tensor = self._now(name, watched)
        if tensor is watched.tensor and tensor._version == watched.version:
            return False
        before, watched.tensor, watched.version = watched.tensor, tensor, tensor._version
        if watched.frozen:
            watched.checksum = None
            return True
        known, watched.checksum = watched.checksum, checksum(bytes_of(contiguous(tensor)))
        if watched.checksum == known:
            return False
        is_cache = not watched.saved and (tensor.shape != before.shape or not watched.filled)
        watched.filled = True
        return not is_cache

    def _compared(self, known: set[str]) -> Iterator[str]:
        """Those of the next part that have other contents than when their turn came last."""
        left = PART_BYTES
        for _ in range(len(self._turns)):
            if left <= 0:
                break
            self._turns.append(name := self._turns.pop(0))
            watched = self._watched[name]
            memory = bytes_of(contiguous(watched.tensor))
            left -= memory.nbytes
            before, watched.checksum = watched.checksum, checksum(memory)
            if before is not None and before != watched.checksum and name not in known:
                yield name

    def _now(self, name: str, watched: _Watched) -> torch.Tensor:
        owner, leaf = self._running.owner(name), name.rpartition(".")[2]
        tensor = (owner._parameters if watched.frozen else owner._buffers).get(leaf)
        return watched.tensor if tensor is None else tensor


def saved_buffers(root: nn.Module) -> Iterable[str]:
    """The names of the buffers that are part of the model's state."""
    saved = saved_names(root)
    return [name for name, _ in root.named_buffers() if name in saved]


def saved_names(root: nn.Module) -> set[str]:
    """What the model's own `state_dict` calls its tensors."""
    with partial():
        return set(root.state_dict(keep_vars=True))
