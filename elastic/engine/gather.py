"""All-gather of updated parameters over links: straight into the flat vectors, awaited layer by layer as the next step needs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from elastic.comm.endpoint import Endpoint
from elastic.comm.message import Kind, Tag
from elastic.engine.boundary import as_bytes
from elastic.engine.model import LayeredModel
from elastic.view import View


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One owned run on its way to, or from, another worker."""

    peer: int
    layer: int
    start: int
    memory: np.ndarray  # uint8, the parameters' own memory

    def tag(self, step: int) -> Tag:
        return Tag(Kind.PARAMETER, step, self.layer, self.start)


class Gatherer:
    """The parameter side of one worker in one view."""

    def __init__(self, worker: int, model: LayeredModel, view: View, network: Endpoint) -> None:
        self._network = network
        self._model = model
        self._gathered: dict[int, list[tuple[int, torch.Tensor]]] = {}
        self.arrived: Callable[[int], None] | None = None  # told of every layer whose parameters have come
        self._outgoing: list[Piece] = []
        self._incoming: list[Piece] = []
        self._awaited: dict[int, list[tuple[int, Tag]]] = {}
        layout = view.layout
        for layer in layout.layers:
            needs = {member: [(0, model.spec.layers[layer.layer].size)] for member in layer.members}
            for other in layout.layers:
                for home, start, stop in model.spec.tied_runs(other.layer):
                    for member in other.members:
                        if home == layer.layer and member not in layer.members:
                            needs.setdefault(member, []).append((start, stop))
            for interval in layer.intervals:
                for member, runs in needs.items():
                    if member == interval.owner or worker not in (member, interval.owner):
                        continue
                    for first, last in dict.fromkeys(runs):
                        start, stop = max(first, interval.start), min(last, interval.stop)
                        if start < stop:
                            memory = as_bytes(model.run(layer.layer, start, stop))
                            if worker == interval.owner:
                                self._outgoing.append(Piece(peer=member, layer=layer.layer, start=start, memory=memory))
                            else:
                                self._incoming.append(Piece(peer=interval.owner, layer=layer.layer, start=start, memory=memory))
        self._homes = {layer.index: [layer.index, *(tie.home for tie in layer.ties)] for layer in model.spec.layers}

    def gathered(self, layer: int) -> list[tuple[int, torch.Tensor]]:
        """Where the runs of a layer start that come from other owners, and their memory here."""
        if layer not in self._gathered:
            itemsize = self._model.dtype(layer).itemsize
            pieces = dict.fromkeys((p.start, p.start + p.memory.nbytes // itemsize) for p in self._incoming if p.layer == layer)
            self._gathered[layer] = [(start, self._model.run(layer, start, stop)) for start, stop in pieces]
        return self._gathered[layer]

    @property
    def peers(self) -> set[int]:
        """The workers that this one exchanges parameters with."""
        return {piece.peer for piece in [*self._outgoing, *self._incoming]}

    def begin(self, step: int) -> None:
        """Lets the step's updates by other owners come in: from here on the parameters here are in transition."""
        for piece in self._incoming:
            self._network.post(piece.peer, piece.tag(step), piece.memory)
            self._awaited.setdefault(piece.layer, []).append((piece.peer, piece.tag(step)))

    def send(self, step: int) -> None:
        """Sends every owned run, as updated in the step; returns at once."""
        for piece in self._outgoing:
            self._network.send(piece.peer, piece.tag(step), piece.memory)

    def wait(self, layer: int) -> None:
        """Returns when the layer's parameters, tied ones included, are up to date."""
        for home in self._homes[layer]:
            awaited = self._awaited.get(home, [])
            while awaited:  # one that could not be received stays awaited
                self._network.receive(*awaited[0])
                del awaited[0]
            if self._awaited.pop(home, None) is not None and self.arrived is not None:
                self.arrived(home)

    def settle(self) -> set[int]:
        """Takes the parameters that have come, waiting for none: the layers that are not up to date. May be called again if interrupted."""
        for awaited in self._awaited.values():
            for message in list(awaited):
                if self._network.arrived(*message):
                    self._network.receive(*message)
                    awaited.remove(message)
        return {layer for layer, awaited in self._awaited.items() if awaited}

    def wait_all(self) -> None:
        """Returns when every parameter held here is up to date."""
        for layer in list(self._awaited):
            self.wait(layer)
