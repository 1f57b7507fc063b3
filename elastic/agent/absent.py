"""Finds out whether the agents of hosts still live whose connections have ended: if so, what they keep in memory may come back.

The end of a connection says nothing about a process. The other side may have closed it, because it had not heard this one for a while, or
something between the two hosts. Only if nobody listens at the agent's address any more, or somebody else does, it has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from elastic.agent.agent_link import Address, NobodyListens, dial, secret_of
from elastic.agent.loop import Loop
from elastic.agent.remote_carrier import RemoteCarrier
from elastic.comm.handshake import WrongSecret
from elastic.comm.streams import Stream
from elastic.comm.tls import Tls
from elastic.control.attempt import RETURN_S
from elastic.errors import LinkError

_AGAIN_S = 0.5
_TRIES = round(RETURN_S / _AGAIN_S)  # longer nobody waits for the host


class AbsentAgents:
    """Dials the agents of lost hosts; `present` has the hosts that are there, by name. `gone` is called when one is known to have ended."""

    def __init__(
        self, loop: Loop, job: bytes, tls: Tls | None, present: Mapping[str, object], gone: Callable[[RemoteCarrier], None]
    ) -> None:
        self._loop, self._job, self._tls, self._present, self._gone = loop, job, tls, present, gone
        self._asked: dict[str, Callable[[], None]] = {}  # what gives up the last dial of each agent

    def close(self) -> None:
        """Asks no more."""
        for name, give_up in self._asked.items():
            self._loop.clear_timer(f"absent {name}")
            give_up()

    def ask(self, host: RemoteCarrier, address: Address, tries: int = _TRIES) -> None:
        """Dials the agent of a host that is lost, again and again until it is known to have ended, or is back, or nobody waits for it."""

        def connected(stream: Stream) -> None:
            stream.sock.close()

        def failed(error: LinkError) -> None:
            if isinstance(error, NobodyListens | WrongSecret):
                self._gone(host)
            elif tries > 1:
                self._loop.set_timer(_AGAIN_S, again, f"absent {host.name}")

        def again() -> None:
            if host.name not in self._present:
                self.ask(host, address, tries - 1)

        secret = secret_of(self._job, host.name)
        self._asked[host.name] = dial(self._loop, secret, address, connected, failed, tls=self._tls, either=True)
