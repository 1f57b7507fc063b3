"""Tensors over links: what engines send to other members of a view, whatever kind of memory it lies in.

There are two ways. `InPlaceLinks` sends tensors of the CPU as they lie there, and receives into them. `StagedLinks` sends from a device: it
copies to pinned memory beside the computation, and sends when the copy is over; what it receives is copied up, and only the computation
waits for that. Libraries that move device memory themselves (NCCL, IPC) can stand behind the same interface: `source` and `sink` are made
once for a view, so that memory can be registered. `tests/engine/tensor_link_rules.py` has what every way must do.

The bits of a message do not depend on the way. What one way sends, another one can receive.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from elastic.comm.endpoint import Endpoint
from elastic.comm.message import AttemptId, Tag
from elastic.memory import device
from elastic.memory.staging import Part, Staged, StagedLanding, Staging
from elastic.memory.tensors import HostBytes, Landing, bytes_of, contiguous_only

Source = Callable[[int, Tag], None]
"""Sends the present values of one tensor to a peer."""


class Sink:
    """A tensor that is filled by messages, one after the other. `size` is in bytes."""

    __slots__ = ("_landing", "_network", "_peer", "_tag")

    def __init__(self, network: Endpoint, landing: Landing) -> None:
        self._network, self._landing = network, landing
        self._peer, self._tag = -1, Tag(0, 0)

    @property
    def size(self) -> int:
        """Bytes of the tensor, and of each message."""
        return self._landing.size

    def post(self, peer: int, tag: Tag) -> None:
        """Expects a message of a peer. The tensor must be neither read nor written to before `take`."""
        self._peer, self._tag = peer, tag
        self._landing.begin()
        self._network.post(peer, tag, self._landing.bytes)

    def arrived(self) -> bool:
        """Returns whether `take` would return at once."""
        return self._network.arrived(self._peer, self._tag)

    def take(self) -> torch.Tensor:
        """Waits for the message, and returns the tensor; all later computation sees the values. Raises what `Endpoint.receive` raises."""
        self._network.receive(self._peer, self._tag)
        return self._landing.take()

    def fill(self, values: np.ndarray) -> torch.Tensor:
        """Does what `take` does with bytes that are on this host already, without a message."""
        self._landing.begin()
        self._landing.bytes[:] = values
        return self._landing.take()

    def head(self, size: int) -> np.ndarray:
        """Returns the first bytes of the message that was taken, on the host. They are valid until the next `post`."""
        return self._landing.bytes[:size]


class TensorLinks(ABC):
    """One worker's links to the other members, for tensors. Messages and errors are those of `network`."""

    def __init__(self, network: Endpoint) -> None:
        self.network = network

    @abstractmethod
    def send(self, peer: int, tag: Tag, *parts: Part) -> None:
        """Sends parts as one message, with the values that the computation so far gives them; returns at once.

        Tensors must not be written to before `flush` has returned, or the peer is known to have the message. Raises PeerLost if there is
        no link to the peer.
        """

    @abstractmethod
    def source(self, tensor: torch.Tensor) -> Source:
        """Returns what sends the values of one contiguous tensor, as `send` does. Raises ValueError on another one."""

    @abstractmethod
    def sink(self, tensor: torch.Tensor) -> Sink:
        """Returns what receives into a contiguous tensor. Raises ValueError on another one."""

    def push(self) -> None:  # noqa: B027  nothing is held back in place
        """Hands over to the network what `send` has held back. Call it before this worker waits for anything but messages."""

    def flush(self) -> None:
        """Returns when everything that was sent was handed to the kernel. Raises what `Endpoint.flush` raises."""
        self.push()
        self.network.flush()

    def release(self) -> None:  # noqa: B027
        """Lets go of what was not handed over; nothing else may be called afterwards."""


class InPlaceLinks(TensorLinks):
    """Sends and receives tensors of the CPU where they lie."""

    def send(self, peer: int, tag: Tag, *parts: Part) -> None:
        self.network.send(peer, tag, *(part if isinstance(part, bytes) else bytes_of(part) for part in parts))

    def source(self, tensor: torch.Tensor) -> Source:
        values, network = HostBytes(tensor), self.network
        return lambda peer, tag: network.send(peer, tag, values.now())

    def sink(self, tensor: torch.Tensor) -> Sink:
        return Sink(self.network, Landing(tensor))


class StagedLinks(TensorLinks):
    """Sends and receives tensors of a device through pinned memory.

    Messages are sent in order, each when it has been copied: that is looked at when the next one is sent. A worker that would wait for a
    message hands over all of its own first, so no two workers wait for what the other one holds back.

    Only the thread that trains may use it, and wait for messages.
    """

    def __init__(self, network: Endpoint) -> None:
        super().__init__(network)
        self._staging = Staging()
        self._held_back: deque[tuple[AttemptId, int, Tag, Staged]] = deque()
        network.before_wait = self.push

    def send(self, peer: int, tag: Tag, *parts: Part) -> None:
        self.network.link(peer)
        self._held_back.append((self.network.attempt_id, peer, tag, self._staging.down(parts)))
        while self._held_back and self._held_back[0][-1].over:
            self._send_first()

    def source(self, tensor: torch.Tensor) -> Source:
        return partial(_send_one, self, contiguous_only(tensor))

    def sink(self, tensor: torch.Tensor) -> Sink:
        return Sink(self.network, StagedLanding(tensor, self._staging))

    def push(self) -> None:
        while self._held_back:
            self._send_first()

    def release(self) -> None:
        while self._held_back:
            self._held_back.popleft()[-1].bytes()  # memory that is copied to must not be given back

    def _send_first(self) -> None:
        attempt_id, peer, tag, message = self._held_back.popleft()
        memory = message.bytes()
        if attempt_id == self.network.attempt_id:  # else nobody expects it any more
            self.network.send(peer, tag, memory)


def _send_one(links: TensorLinks, tensor: torch.Tensor, peer: int, tag: Tag) -> None:
    links.send(peer, tag, tensor)


def tensor_links(network: Endpoint) -> TensorLinks:
    """Returns the links for tensors of the device that this process computes on."""
    return InPlaceLinks(network) if device.on_host() else StagedLinks(network)
