"""Messages between neighbouring stages: activations go forward, gradients back, along the route of each micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from elastic.comm.message import MessageKind, Tag
from elastic.engine.boundary import Crossing, decode, encode
from elastic.engine.tensor_links import TensorLinks
from elastic.view import View

EVALUATION = 1 << 63
"""Set in a tag's step to mark messages of an evaluation."""


class Pipe:
    """One worker's part of the pipeline. In training, micro-batches follow the plan's routes; in evaluation they are dealt in turn."""

    def __init__(self, worker: int, view: View, links: TensorLinks) -> None:
        self._links, self._workload, self._routes = links, view.workload, view.plan.routes
        self._members = [stage.members for stage in view.plan.stages]
        self.stage = view.plan.stage_of(worker)
        self.first, self.last = self.stage == 0, self.stage == len(self._members) - 1

    @property
    def peers(self) -> set[int]:
        """All members of the neighbouring stages, since evaluation may connect any two."""
        near = (stage for stage in (self.stage - 1, self.stage + 1) if 0 <= stage < len(self._members))
        return {member for stage in near for member in self._members[stage]}

    def takes(self, step: int, micro_batch: int) -> bool:
        """Whether the micro-batch passes through this worker."""
        return self._at(self.stage, step, micro_batch) == self._links.network.worker

    def receive_activations(self, step: int, micro_batch: int) -> Crossing:
        """Receives the micro-batch's output of the stage before."""
        message = self._links.network.receive(
            self._at(self.stage - 1, step, micro_batch), Tag(MessageKind.ACTIVATION, step, self.stage, micro_batch)
        )
        return decode(message)

    def send_activations(self, step: int, micro_batch: int, crossing: Crossing) -> None:
        """Sends this stage's output to the next; returns at once."""
        after = self.stage + 1
        self._links.send(self._at(after, step, micro_batch), Tag(MessageKind.ACTIVATION, step, after, micro_batch), *encode(crossing))

    def receive_gradients(self, step: int, micro_batch: int) -> Sequence[torch.Tensor | None]:
        """Receives the gradients of the tensors that `send_activations` sent."""
        peer = self._at(self.stage + 1, step, micro_batch)
        return decode(self._links.network.receive(peer, Tag(MessageKind.GRADIENT, step, self.stage, micro_batch))).tensors

    def send_gradients(self, step: int, micro_batch: int, gradients: Sequence[torch.Tensor | None]) -> None:
        """Sends the gradients of this stage's input to the stage before; returns at once."""
        before = self.stage - 1
        back = Crossing(structure=None, tensors=tuple(gradients), differentiable=())
        self._links.send(self._at(before, step, micro_batch), Tag(MessageKind.GRADIENT, step, before, micro_batch), *encode(back))

    def _at(self, stage: int, step: int, micro_batch: int) -> int:
        if step & EVALUATION:
            return self._members[stage][micro_batch % len(self._members[stage])]
        return self._routes[stage][self._workload.grain_of(micro_batch)]
