"""Detects changes to tensors that must not change during training: buffers, frozen parameters, and parameters inside a step.

Every worker has all buffers and frozen parameters as it built them. If one worker changes them, the change is missing on other workers, in
checkpoints and on joiners. Torch's version counters show in-place changes. Changes that torch does not count (through `.data` or NumPy) are
found by checksums; each step checks a part of the memory. Writing the same values again is no change. A buffer outside the state_dict may
be a cache: it may be replaced by one of another shape, and filled once.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from elastic.engine.buffers import Running
from elastic.engine.partial import partial
from elastic.errors import TrainerError
from elastic.memory.raw import checksum
from elastic.memory.tensors import bytes_of, contiguous

PART_BYTES = 1 << 20
"""Bytes whose checksums are compared in each step."""

_OUTSIDE = (
    "keep what changes outside of the model that the Trainer gets (an averaged copy: see `average` of the Trainer, or of the loader), and "
    "call model.load_state_dict before the first loop only"
)
_EVALUATED = "a forward in training mode does that, such as an evaluation without model.eval(): call it before, and model.train() behind it"
_UNCOUNTED = "if nothing writes to it, the memory of this host may be faulty"


@dataclass(slots=True, kw_only=True)
class _Watched:
    """One tensor: the object and its version at the last check, and its checksum if one was computed. `saved`: it is in the state_dict."""

    tensor: torch.Tensor
    version: int
    frozen: bool
    saved: bool
    checksum: str | None = None
    filled: bool = False


class ChangeWatch:
    """Checks the tensors of one worker. The buffers in `running` may change, since the runtime applies and moves their changes."""

    def __init__(self, root: nn.Module, running: Running, *, exact: bool) -> None:
        self._root, self._running, self._exact = root, running, exact
        self._parameters = {name: parameter for name, parameter in root.named_parameters() if parameter.requires_grad}
        self._before: list[int] = []
        self._watched: dict[str, _Watched] = {}
        self._warned: set[str] = set()
        self.renew()

    def renew(self) -> None:
        """Accepts the present values of all tensors, after the model was built or a checkpoint was loaded."""
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

    def moved(self, names: Collection[str]) -> None:
        """Accepts what tensors of these names are now: they were laid elsewhere, or are no longer here."""
        for name in self._watched.keys() & set(names):
            watched = self._watched[name]
            watched.tensor = self._now(name, watched)
            watched.version, watched.checksum = watched.tensor._version, None

    def begin(self, step: int) -> None:
        """Checks before the first forward of a step. Raises TrainerError if a tensor has changed since the last step."""
        self.untouched(step)
        counted = self._counted()
        for name in [*counted, *self._compared(set(counted))]:
            kind = "frozen parameter" if self._watched[name].frozen else "buffer"
            self._complain(
                name,
                f"{kind} {self._where(name)} was changed between two steps, before step {step}: that is not in checkpoints, and workers "
                "that join do not have it",
                _OUTSIDE if name in counted else f"{_OUTSIDE}; {_UNCOUNTED}",
            )
        self._before = [parameter._version for parameter in self._parameters.values()]

    def untouched(self, step: int) -> None:
        """Raises TrainerError if other code has changed running statistics. Called before the runtime updates them."""
        for name in self._running.touched():
            changed = f"buffer {self._where(name)}, a running statistic, was changed between two steps, before step {step}"
            self._refuse(changed, f"{_EVALUATED}. If nothing does, {_OUTSIDE}")

    def end(self, step: int) -> None:
        """Checks after the last backward of a step, before the step can commit. Raises TrainerError if the layers have changed a tensor."""
        now = [parameter._version for parameter in self._parameters.values()]
        if now != self._before:
            name = next(name for name, one, other in zip(self._parameters, self._before, now, strict=True) if one != other)
            self._refuse(
                f"parameter {self._where(name)} was changed in place by the forward of step {step}: neither other workers nor the "
                "optimizer get this change",
                "leave out max_norm= and the like, or change trained parameters in after_step (of the Trainer, or of the loader)",
            )
        for name in [*self._changed(), *self._running.changed()]:
            if name in self._watched and self._watched[name].frozen:
                self._refuse(
                    f"frozen parameter {self._where(name)} was changed by the forward of step {step}: other workers have copies of it that "
                    "do not change",
                    "keep what a forward changes in a buffer (with exact=False, all workers take the values of one worker)",
                )
            self._complain(
                name,
                f"buffer {self._where(name)} was changed by the forward of step {step}: its values depend on which worker runs which "
                "micro-batches",
                "use BatchNorm, whose running statistics are applied in order, or a layer without state (LayerNorm, GroupNorm). With "
                "exact=False, all workers take the values of the worker that ran most micro-batches of the layer",
            )

    def _complain(self, name: str, what: str, advice: str) -> None:
        if self._exact or (name in self._watched and self._watched[name].frozen):  # copies of frozen ones count as those of every step
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
        """Returns the names of the tensors that have changed since the last call."""
        found = self._counted()
        return [*found, *self._compared(set(found))]

    def _counted(self) -> list[str]:
        """Returns the names of those that have changed by torch's version counters."""
        return [name for name, watched in self._watched.items() if self._has_changed(name, watched)]

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
        """Yields the tensors of the next part whose checksum differs from the last one, except those in `known`."""
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
    """Returns the names of the buffers in the model's state_dict."""
    return sorted(saved_names(root))


def saved_names(root: nn.Module) -> set[str]:
    """Returns the names of the buffers in the model's `state_dict`, which may have other names for them."""
    with partial():
        held = {id(tensor) for tensor in root.state_dict(keep_vars=True).values()}
    return {name for name, buffer in root.named_buffers() if id(buffer) in held}
