"""What a worker tells another one of its host in a step, in one message instead of one for each tensor: where the tensors lie.

Nothing is gained by telling it earlier, since the values are in shared memory already. A message costs as much processor time as a
megabyte is copied in.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

import torch

from elastic.comm.endpoint import Endpoint
from elastic.comm.message import MessageKind, Tag
from elastic.memory.tensors import Landing, empty


class Bundle:
    """The message of one `peer` in each step. `sizes` are the bytes of its parts, in an order that both workers know."""

    def __init__(self, kind: MessageKind, peer: int, sizes: Iterable[int]) -> None:
        self.peer = peer
        self._kind = kind
        self._ends = list(accumulate(sizes, initial=0))
        self._landing = Landing(empty(self._ends[-1], torch.uint8))
        self._tag: Tag | None = None
        self._message: torch.Tensor | None = None

    @property
    def size(self) -> int:
        """Bytes of the message."""
        return self._landing.size

    def post(self, network: Endpoint, step: int) -> None:
        """Posts memory for the message of a step."""
        self._tag, self._message = tag(self._kind, step), None
        network.post(self.peer, self._tag, self._landing.bytes)

    def arrived(self, network: Endpoint) -> bool:
        """Returns whether a part can be had without waiting."""
        return self._message is not None or (self._tag is not None and network.arrived(self.peer, self._tag))

    def part(self, network: Endpoint, number: int) -> torch.Tensor:
        """Returns a part of the message (uint8), once that has arrived. It is valid until the next `post`."""
        if self._message is None:
            assert self._tag is not None  # posted by `begin` of its owner
            network.receive(self.peer, self._tag)
            self._message = self._landing.take()
        return self._message[self._ends[number] : self._ends[number + 1]]


def tag(kind: MessageKind, step: int) -> Tag:
    """Returns the tag of a worker's bundle. A worker sends its peers of the same host no other message of this kind."""
    return Tag(kind, step)
