"""Decides whether a job goes on whose view etcd has lost: no other host may train in a newer view, of which this one does not know."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from elastic.agent.agent_link import Address, NobodyListens, dial, secret_of
from elastic.agent.loop import Loop
from elastic.comm.handshake import WrongSecret
from elastic.comm.streams import Stream
from elastic.comm.tls import Tls
from elastic.errors import LinkError


def doubtful(members: Collection[str], present: Collection[str], gone: Collection[str]) -> set[str]:
    """Returns the hosts that might go on in a newer view than the one with the hosts `members`; none if this one may be resumed.

    The agents of `gone` hosts have ended, and their workers with them. Of the others a majority must be `present`: they know of no newer
    view, and without them nobody else is a majority.
    """
    possible = set(members).difference(gone)
    return set() if 2 * len(possible.intersection(present)) > len(possible) else possible.difference(present)


class LifeSigns:
    """Dials agents that have not arrived. `gone` has those that have ended: at their address nobody listens any more, or somebody else."""

    def __init__(self, loop: Loop, job: bytes, addresses: Mapping[str, Address], tls: Tls | None) -> None:
        self.gone: set[str] = set()
        self._loop, self._job, self._addresses, self._tls = loop, job, addresses, tls
        self._dialled: dict[str, Callable[[], None]] = {}  # what gives up each dial

    def ask(self, agents: Iterable[str]) -> None:
        """Dials those of the agents of which it is not known that they have ended, and not dialled now."""
        for agent in {*agents}.intersection(self._addresses).difference(self.gone, self._dialled):
            connected, failed = self._connected(agent), self._failed(agent)
            self._dialled[agent] = dial(
                self._loop, secret_of(self._job, agent), self._addresses[agent], connected, failed, tls=self._tls, either=True
            )

    def close(self) -> None:
        for give_up in self._dialled.values():
            give_up()

    def _connected(self, agent: str) -> Callable[[Stream], None]:
        def connected(stream: Stream) -> None:
            del self._dialled[agent]
            stream.sock.close()

        return connected

    def _failed(self, agent: str) -> Callable[[LinkError], None]:
        def failed(error: LinkError) -> None:
            del self._dialled[agent]
            if isinstance(error, NobodyListens | WrongSecret):
                self.gone.add(agent)

        return failed
