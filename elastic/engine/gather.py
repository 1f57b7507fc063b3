"""All-gather of updated parameters over links, straight into the flat vectors; the next step awaits them layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from elastic.comm.message import MessageKind, Tag
from elastic.engine.bundle import Bundle, tag
from elastic.engine.model import LayeredModel
from elastic.engine.shared import REFERENCE_BYTES, SharedMemory
from elastic.engine.tensor_links import Sink, Source, TensorLinks
from elastic.layout.transfer import updates
from elastic.memory.tensors import bytes_of
from elastic.view import View


@dataclass(frozen=True, slots=True, kw_only=True)
class _ParameterRun:
    """One run of parameters, and the worker that receives or sends it."""

    peer: int
    layer: int
    start: int

    def tag(self, step: int) -> Tag:
        return Tag(MessageKind.PARAMETER, step, self.layer, self.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent(_ParameterRun):
    values: torch.Tensor
    source: Source | None  # None: the receiver reads the values in this worker's memory


@dataclass(frozen=True, slots=True, kw_only=True)
class _Received(_ParameterRun):
    """`sink` is for the values; a near sender says where they lie in the `part` of its bundle with this number."""

    sink: Sink
    part: int | None


class Gatherer:
    """The parameter exchange of one worker in one view."""

    def __init__(self, worker: int, model: LayeredModel, view: View, links: TensorLinks, shared: SharedMemory) -> None:
        self._network, self._shared = links.network, shared
        self._model = model
        self._gathered: dict[int, list[tuple[int, torch.Tensor]]] = {}
        self.arrived: Callable[[int], None] | None = None  # called for every layer whose parameters have arrived
        self._outgoing: list[_Sent] = []
        self._incoming: list[_Received] = []
        self._awaited: dict[int, list[_Received]] = {}
        parts = Counter[int]()
        for layer in range(len(view.layout.layers)):
            for move in sorted(updates(view.layout, layer, worker), key=lambda move: move.start):
                run = model.run(layer, move.start, move.stop)
                if worker == move.source:
                    peer = move.destination
                    source = None if peer in shared else links.source(run)
                    self._outgoing.append(_Sent(peer=peer, layer=layer, start=move.start, values=run, source=source))
                else:
                    part = parts[move.source] if move.source in shared else None
                    parts[move.source] += 1
                    where = {"peer": move.source, "layer": layer, "start": move.start}
                    self._incoming.append(_Received(**where, sink=links.sink(run), part=part))
        near = [peer for peer in parts if peer in shared]
        self._bundles = {peer: Bundle(MessageKind.PARAMETER, peer, [REFERENCE_BYTES] * parts[peer]) for peer in near}
        modules = model.spec.layers[: model.spec.depth]
        self._homes = {layer.index: [*model.spec.parts[layer.index], *(tie.home for tie in layer.ties)] for layer in modules}

    def gathered(self, layer: int) -> list[tuple[int, torch.Tensor]]:
        """Returns the start and the memory of each run of a layer that another worker owns."""
        if layer not in self._gathered:
            itemsize = self._model.dtype(layer).itemsize
            pieces = dict.fromkeys((p.start, p.start + p.sink.size // itemsize) for p in self._incoming if p.layer == layer)
            self._gathered[layer] = [(start, self._model.run(layer, start, stop)) for start, stop in pieces]
        return self._gathered[layer]

    @property
    def peers(self) -> set[int]:
        """The workers that this one exchanges parameters with."""
        return {piece.peer for piece in [*self._outgoing, *self._incoming]}

    def begin(self, step: int) -> None:
        """Posts memory for the step's updates by other owners; from here on the parameters here may change."""
        for bundle in self._bundles.values():
            bundle.post(self._network, step)
        for piece in self._incoming:
            if piece.part is None:
                piece.sink.post(piece.peer, piece.tag(step))
            self._awaited.setdefault(piece.layer, []).append(piece)

    def send(self, step: int) -> None:
        """Sends every owned run, as updated in the step; returns at once."""
        told: dict[int, list[bytes]] = {}
        for piece in self._outgoing:
            if piece.source is None:
                told.setdefault(piece.peer, []).append(self._shared.reference(piece.values))
            else:
                piece.source(piece.peer, piece.tag(step))
        for peer, references in told.items():
            self._network.send(peer, tag(MessageKind.PARAMETER, step), b"".join(references))

    def wait(self, layer: int) -> None:
        """Returns when the parameters of a module, tied ones included, are up to date."""
        for home in self._homes[layer]:
            self._wait(home)

    def _wait(self, home: int) -> None:
        awaited = self._awaited.get(home, [])
        while awaited:  # a run that could not be received stays awaited
            self._receive(awaited[0])
            del awaited[0]
        if self._awaited.pop(home, None) is not None and self.arrived is not None:
            self.arrived(home)

    def settle(self) -> set[int]:
        """Takes the parameters that have arrived, without waiting, and returns the layers that are not up to date.

        May be called again if interrupted.
        """
        for awaited in self._awaited.values():
            for piece in list(awaited):
                if piece.sink.arrived() if piece.part is None else self._bundles[piece.peer].arrived(self._network):
                    self._receive(piece)
                    awaited.remove(piece)
        return {layer for layer, awaited in self._awaited.items() if awaited}

    def _receive(self, piece: _Received) -> None:
        if piece.part is None:
            piece.sink.take()
        else:
            reference = bytes_of(self._bundles[piece.peer].part(self._network, piece.part))
            piece.sink.fill(self._shared.values(piece.peer, reference, piece.sink.size))

    def wait_all(self) -> None:
        """Returns when every parameter held here is up to date."""
        for home in list(self._awaited):
            self._wait(home)
