"""Buffers that training changes. Every worker holds all of them, whichever layers it has, as they were behind each of the last two steps.

These are the running statistics of BatchNorm, which are exact (`statistics`), and with `exact=False` whatever else is saved with the model
(`loose`): where a forward changes it, the values of the worker that ran most of a layer's micro-batches are everybody's behind the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from elastic.engine.statistics import Arrays, Records, Statistics
from elastic.errors import TrainerError
from elastic.memory.digest import digest
from elastic.memory.tensors import bytes_of, contiguous, copy, of_bytes

Values = dict[str, torch.Tensor]


class Running:
    """Of one model. `root` names its modules; `layers` are its layers in order. A model without such buffers costs nothing here."""

    def __init__(self, root: nn.Module, layers: Sequence[nn.Module]) -> None:
        self._root = root
        self._layer_of = {id(module): index for index, layer in reversed([*enumerate(layers)]) for module in layer.modules()}
        self.statistics = Statistics(root, layers)
        self.loose: dict[int, tuple[str, ...]] = {}
        self._known: dict[int, Values] = {}
        self._versions: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        """Of all such buffers, sorted."""
        return sorted({*self.statistics.buffers, *(name for names in self.loose.values() for name in names)})

    @property
    def steps(self) -> dict[int, str]:
        """The steps behind which they are known, each with a digest of them; none if there are none."""
        return {step: digest(self.packed(step)) for step in self._known} if self.names else {}

    def loosen(self, names: Iterable[str]) -> None:
        """These buffers may change in forward, in ways that nobody knows."""
        for name in sorted(set(names).difference(self.names)):
            layer = self.layer_of(name)
            self.loose[layer] = (*self.loose.get(layer, ()), name)

    def layer_of(self, name: str) -> int:
        """The first layer that has the module of a buffer or parameter; 0 for what the list of layers itself has."""
        return self._layer_of.get(id(self.owner(name)), 0)

    def owner(self, name: str) -> nn.Module:
        """The module that a buffer or parameter belongs to."""
        return self._root.get_submodule(name.rpartition(".")[0])

    def now(self) -> Values:
        """The values as they are: the buffers themselves."""
        return {name: self._root.get_buffer(name).detach() for name in self.names}

    def record(self, step: int) -> None:
        """The buffers are now as they were behind `step`."""
        self._known[step] = {name: copy(value) for name, value in self.now().items()}
        self._seen()

    def _seen(self) -> None:
        self._versions = {name: value._version for name, value in self.now().items()}

    def touched(self) -> list[str]:
        """The running statistics that somebody else has changed since they were last applied."""
        return [name for name in self.statistics.buffers if self._root.get_buffer(name)._version != self._versions.get(name)]

    def changed(self) -> list[str]:
        """The loose buffers that were changed since then."""
        names = [name for each in self.loose.values() for name in each]
        return [name for name in names if self._root.get_buffer(name)._version != self._versions.get(name)]

    def told(self, layers: Iterable[int]) -> dict[str, np.ndarray]:
        """What the worker that speaks for these layers tells of their loose buffers, by name, where they have changed."""
        mine = {name for layer in layers for name in self.loose.get(layer, ())}
        return {f"buffer {name}": bytes_of(contiguous(self._root.get_buffer(name))) for name in self.changed() if name in mine}

    def apply(self, step: int, records: Records, arrays: Arrays) -> None:
        """Brings them up to `step`, with what all members have told."""
        if not self.names:
            return
        known = self._known.get(step - 1)
        if known is not None:  # what this worker's own forwards have made of loose ones does not count, but for what is told
            self._install({name: known[name] for names in self.loose.values() for name in names})
        self.statistics.apply(records)
        loose = {name: arrays[f"buffer {name}"] for names in self.loose.values() for name in names if f"buffer {name}" in arrays}
        self._install({name: self._read(name, memory) for name, memory in loose.items()})
        self._known = {each: values for each, values in self._known.items() if each == step - 1}
        self.record(step)

    def restore(self, step: int) -> None:
        """Goes back, or on, to what is known of `step`."""
        if self.names:
            self._install(self._known[step])
            self._seen()

    def at(self, step: int) -> Values:
        """The values behind a step that is known."""
        return self._known[step]

    @property
    def bytes(self) -> int:
        """Memory of all values."""
        return sum(value.numel() * value.element_size() for value in self.now().values())

    def packed(self, step: int) -> np.ndarray:
        """All values behind a step, one behind the other."""
        parts = [bytes_of(contiguous(self._known[step][name])) for name in self.names]
        return np.concatenate(parts) if parts else np.array([], dtype=np.uint8)

    def unpack(self, step: int, memory: np.ndarray) -> None:
        """The inverse, of what came from another worker."""
        values, position = {}, 0
        for name, buffer in self.now().items():
            size = buffer.numel() * buffer.element_size()
            values[name] = self._read(name, memory[position : position + size])
            position += size
        self._known[step] = values

    def _read(self, name: str, memory: np.ndarray) -> torch.Tensor:
        buffer = self._root.get_buffer(name)
        if memory.nbytes != buffer.numel() * buffer.element_size():
            raise TrainerError(f"buffer {name} has another size on another worker: give it a fixed shape, since all must have the same")
        return of_bytes(memory.reshape(-1).copy(), buffer.dtype, buffer.shape)

    def _install(self, values: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self._root.get_buffer(name).copy_(value)
