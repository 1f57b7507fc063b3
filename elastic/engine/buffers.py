"""Buffers that training changes. Every worker holds all of them, also those of layers it does not run, as of each of the last two steps,
and of the step of the state that is kept to go back to.

There are two kinds. The running statistics of BatchNorm are exact (`statistics`). With `exact=False`, all other buffers of the model's
state_dict are `loose`: if a forward changes one, all workers take the values of the worker that ran most of the layer's micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from elastic.engine.statistics import Arrays, Records, Statistics
from elastic.errors import TrainerError
from elastic.memory.digest import digest
from elastic.memory.raw import checksum_of
from elastic.memory.tensors import bytes_of, contiguous, copy, of_bytes

Values = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Damaged:
    """A buffer whose memory changed after `step`, with its checksums. Its elements count from 0."""

    name: str
    layer: int
    elements: int
    step: int
    was: str
    now: str


def _checksum(values: Values) -> str:
    return checksum_of(bytes_of(contiguous(value)) for _, value in sorted(values.items()))


class Running:
    """The changing buffers of one model. `root` gives the modules their names; `layers` are the model's layers in order."""

    def __init__(self, root: nn.Module, layers: Sequence[nn.Module]) -> None:
        self._root = root
        self._layer_of = {id(module): index for index, layer in reversed([*enumerate(layers)]) for module in layer.modules()}
        self.statistics = Statistics(root, layers)
        self.loose: dict[int, tuple[str, ...]] = {}
        self.kept: int | None = None  # the step of a copy of the state that all may go back to
        self._known: dict[int, Values] = {}
        self._checksums: dict[int, str] = {}  # of `_known`, as they were recorded
        self._versions: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        """The names of all these buffers, sorted."""
        return sorted({*self.statistics.buffers, *(name for names in self.loose.values() for name in names)})

    @property
    def steps(self) -> dict[int, str]:
        """The steps whose values are held here, each with a digest of the values; empty if the model has no such buffer.

        Values that have changed since they were recorded are left out.
        """
        intact = (step for step, values in self._known.items() if _checksum(values) == self._checksums.get(step))
        return {step: digest(self.packed(step)) for step in intact} if self.names else {}

    def loosen(self, names: Iterable[str]) -> None:
        """Declares that a forward may change these buffers in any way."""
        for name in sorted(set(names).difference(self.names)):
            layer = self.layer_of(name)
            self.loose[layer] = (*self.loose.get(layer, ()), name)

    def layer_of(self, name: str) -> int:
        """Returns the first layer that contains the module of a buffer or parameter; 0 if no layer does."""
        return self._layer_of.get(id(self.owner(name)), 0)

    def owner(self, name: str) -> nn.Module:
        """Returns the module that a buffer or parameter belongs to."""
        return self._root.get_submodule(name.rpartition(".")[0])

    def now(self) -> Values:
        """Returns the buffers themselves, detached."""
        return {name: self._root.get_buffer(name).detach() for name in self.names}

    def record(self, step: int) -> None:
        """Keeps a copy of the present values as those after `step`."""
        self._hold(step, {name: copy(value) for name, value in self.now().items()})
        self._seen()

    def _hold(self, step: int, values: Values) -> None:
        self._known[step], self._checksums[step] = values, _checksum(values)
        self._checksums = {each: known for each, known in self._checksums.items() if each in self._known}

    def repair(self, step: int) -> list[Damaged]:
        """Finds running statistics whose memory has changed since they were recorded after `step`, and restores them from their copy."""
        now, known = self.now() if self.names else {}, self._checksums.get(step)
        statistics = {name: now[name] for name in self.statistics.buffers} if known is not None else {}
        kept = self._known.get(step, {})
        if not statistics or _checksum({**kept, **statistics}) == known:
            return []
        intact = _checksum(kept) == known  # else both have changed, and another worker's values are needed
        names = [name for name, value in statistics.items() if not intact or _checksum({name: value}) != _checksum({name: kept[name]})]
        before = {name: _checksum({name: statistics[name]}) for name in names}
        if intact:
            self._install({name: kept[name] for name in names})
            self._seen()
        return [
            Damaged(
                name=name,
                layer=self.layer_of(name),
                elements=now[name].numel(),
                step=step,
                was=_checksum({name: kept[name]}) if intact else "unknown",
                now=before[name],
            )
            for name in names
        ]

    def _seen(self) -> None:
        self._versions = {name: value._version for name, value in self.now().items()}

    def touched(self) -> list[str]:
        """Returns the running statistics that other code has changed since the runtime last wrote them."""
        return [name for name in self.statistics.buffers if self._root.get_buffer(name)._version != self._versions.get(name)]

    def changed(self) -> list[str]:
        """Returns the loose buffers that were changed since the runtime last wrote them."""
        names = [name for each in self.loose.values() for name in each]
        return [name for name in names if self._root.get_buffer(name)._version != self._versions.get(name)]

    def told(self, layers: Iterable[int]) -> dict[str, np.ndarray]:
        """Returns the bytes of these layers' changed loose buffers, by name. The worker whose values count sends them to all."""
        mine = {name for layer in layers for name in self.loose.get(layer, ())}
        return {f"buffer {name}": bytes_of(contiguous(self._root.get_buffer(name))) for name in self.changed() if name in mine}

    def apply(self, step: int, records: Records, arrays: Arrays) -> None:
        """Updates the buffers to the values after `step`, from the records and loose buffers that all members sent."""
        if not self.names:
            return
        known = self._known.get(step - 1)
        if known is not None:  # discards what this worker's forwards wrote to loose buffers; only the values sent count
            self._install({name: known[name] for names in self.loose.values() for name in names})
        self.statistics.apply(records)
        loose = {name: arrays[f"buffer {name}"] for names in self.loose.values() for name in names if f"buffer {name}" in arrays}
        self._install({name: self._read(name, memory) for name, memory in loose.items()})
        self._known = {each: values for each, values in self._known.items() if each in (step - 1, self.kept)}
        self.record(step)

    def skip(self, step: int) -> None:
        """Makes the values after `step` those of the step before."""
        if self.names and (known := self._known.get(step - 1)) is not None:
            self._install(known)
            self._known = {each: values for each, values in self._known.items() if each in (step - 1, self.kept)}
            self.record(step)

    def restore(self, step: int) -> None:
        """Writes the values held for `step` into the buffers."""
        if self.names:
            self._install(self._known[step])
            self._seen()

    def at(self, step: int) -> Values:
        """Returns the values after a step that is held here."""
        return self._known[step]

    @property
    def bytes(self) -> int:
        """Bytes of the values of one step."""
        return sum(value.numel() * value.element_size() for value in self.now().values())

    def packed(self, step: int) -> np.ndarray:
        """Returns the bytes of all values after a step, concatenated in the order of names."""
        parts = [bytes_of(contiguous(self._known[step][name])) for name in self.names]
        return np.concatenate(parts) if parts else np.array([], dtype=np.uint8)

    def unpack(self, step: int, memory: np.ndarray) -> None:
        """Holds the values after a step that another worker has packed; the inverse of `packed`."""
        values, position = {}, 0
        for name, buffer in self.now().items():
            size = buffer.numel() * buffer.element_size()
            values[name] = self._read(name, memory[position : position + size])
            position += size
        self._hold(step, values)

    def _read(self, name: str, memory: np.ndarray) -> torch.Tensor:
        buffer = self._root.get_buffer(name)
        if memory.nbytes != buffer.numel() * buffer.element_size():
            raise TrainerError(f"buffer {name} has another size on another worker: give it a fixed shape, since all must have the same")
        return of_bytes(memory.reshape(-1).copy(), buffer.dtype, buffer.shape)

    def _install(self, values: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self._root.get_buffer(name).copy_(value)
