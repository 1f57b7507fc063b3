"""Checks the links between this agent and others, in both directions and with their speed, before its host joins a job.

The agent that checks dials each other one, sends it bursts, and is dialled and sent bursts by it in turn: hosts that reach each other in
one direction only cannot train together. Speeds are those of the agents' own connections, so links of workers have these or more.

    dialer -> acceptor    burst {data} | burst_end {} | probe_end {name, back, most}; with `back`, the address at which to dial `name` back,
                          to send it bursts of `most` bytes
    acceptor -> dialer    burst_heard {} | back {rate, why}
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from elastic.agent.agent_link import Address, AgentLink, dial, secret_of
from elastic.agent.loop import Loop
from elastic.comm.streams import Stream
from elastic.comm.tls import Tls
from elastic.errors import LinkError
from elastic.host.channel import Message

_PIECE = "x" * (1 << 16)
_BURSTS = (1 << 16, 1 << 20, 8 << 20)  # a larger one only where it takes no longer than _BURST_S
_BURST_S, _MOST_BURSTS = 0.3, 5
_ALL_BYTES = 32 << 20  # of one check in each direction, so that a host that joins a hundred others does not keep them from their work
_AT_ONCE = 8  # probes of one check: with more, each would be measured with a small part of the host's network
_AGAIN_S, _TRIES = 0.2, 5  # a connection that is refused may be one too many at that moment; one that ends, of an agent that is very busy
_LIMIT_S = 10.0

_numbers = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One direction of a link: bytes per second, or why nothing gets through."""

    rate: float | None = None
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkReport:
    """The link to another agent: `there` is the direction to it, `back` the one from it, None if it could not even be asked for."""

    there: Way
    back: Way | None = None


class LinkProbes:
    """The probes of one agent, `name`, which others can dial at `address`. `key` is the job's secret; with `tls` links are encrypted."""

    def __init__(self, loop: Loop, key: bytes, name: str, address: Address, tls: Tls | None) -> None:
        self._loop, self._key, self._name, self.address, self._tls = loop, key, name, address, tls
        self.asked: Callable[[Message], Message] | None = None  # answers a user's question about this host
        self._links: set[AgentLink] = set()
        self._probes: set[_Probe] = set()

    def accept(self, stream: Stream) -> None:
        """Answers an agent that checks its links, or a question about this host; other connections are closed, since this agent does not
        coordinate."""

        def heard(message: Message) -> None:
            if message["type"] == "ask" and self.asked is not None:
                link.send(self.asked(message))
            elif not self.answer(link, message):
                self._forget(link)
                link.close()

        link = AgentLink(self._loop, stream, heard=heard, lost=lambda _: self._forget(link))
        self._links.add(link)

    def answer(self, link: AgentLink, message: Message) -> bool:
        """Answers a message of an agent that checks its links. Returns whether it was one."""
        kind = message["type"]
        if kind == "burst_end":
            link.send({"type": "burst_heard"})
        elif kind == "probe_end" and message["back"] is not None:
            ip, port = message["back"]
            answer = lambda way, _: link.send({"type": "back", "rate": way.rate, "why": way.why})  # noqa: E731
            self._probe(message["name"], (ip, port), None, answer, most=min(message["most"], _ALL_BYTES))
        return kind in ("burst", "burst_end", "probe_end")

    def check(self, others: Mapping[str, Address], done: Callable[[dict[str, LinkReport]], None]) -> None:
        """Checks the links to `others`, some at a time, each within `_LIMIT_S`; calls `done` once with what was found."""
        found: dict[str, LinkReport] = {}
        waiting = deque(others.items())
        size = _ALL_BYTES // max(1, len(others))

        def one(name: str, there: Way, back: Way | None) -> None:
            found[name] = LinkReport(there=there, back=back)
            if waiting:
                begin(*waiting.popleft())
            elif len(found) == len(others):
                done(found)

        def begin(name: str, address: Address) -> None:
            self._probe(name, address, self.address, lambda there, back: one(name, there, back), most=size)

        for _ in range(min(_AT_ONCE, len(others))):
            begin(*waiting.popleft())
        if not others:
            self._loop.post(lambda: done(found))

    def close(self) -> None:
        """Ends all probes; nothing is called back any more."""
        for probe in list(self._probes):
            probe.close()
        for link in self._links:
            link.close()
        self._probes.clear()
        self._links.clear()

    def _forget(self, link: AgentLink) -> None:
        self._links.discard(link)

    def _probe(self, name: str, to: Address, back: Address | None, done: Callable[[Way, Way | None], None], *, most: int) -> None:
        def ended(there: Way, other: Way | None) -> None:
            self._probes.discard(probe)
            done(there, other)

        dials = partial(dial, self._loop, secret_of(self._key, name), to, tls=self._tls)
        probe = _Probe(self._loop, dials, {"type": "probe_end", "name": self._name, "back": back, "most": most}, most, ended)
        self._probes.add(probe)
        probe.begin()


class _Probe:
    """Sends bursts to the agent that `dials` reaches, and at the end `closing`, whose address `back` has that agent do the same. Calls
    `ended` once."""

    def __init__(
        self,
        loop: Loop,
        dials: Callable[[Callable[[Stream], None], Callable[[LinkError], None]], Callable[[], None]],
        closing: Message,
        most: int,
        ended: Callable[[Way, Way | None], None],
    ) -> None:
        self._loop, self._dials, self._closing, self._ended = loop, dials, closing, ended
        self._sizes = [size for size in _BURSTS if size <= most] or [_BURSTS[0]]
        self._timer, self._retry = f"probe {next(_numbers)}", f"probe again {next(_numbers)}"
        self._link: AgentLink | None = None
        self._give_up: Callable[[], None] = lambda: None
        self._failures = self._bursts = 0
        self._sent_at = 0.0
        self._rate: float | None = None
        self._over = False

    def begin(self) -> None:
        self._loop.set_timer(_LIMIT_S, self._late, self._timer)
        self._dial()

    def close(self) -> None:
        self._over = True
        self._loop.clear_timer(self._timer)
        self._loop.clear_timer(self._retry)
        self._give_up()
        if self._link is not None:
            self._link.close()

    def _dial(self) -> None:
        self._give_up = self._dials(self._connected, self._refused)

    def _refused(self, error: LinkError) -> None:
        self._give_up = lambda: None
        if not self._again():
            self._end(Way(why=str(error)), None)

    def _again(self) -> bool:
        """Dials again after a while, unless it has failed so often; returns whether it does."""
        self._link = None
        self._failures += 1
        if self._failures < _TRIES:
            self._loop.set_timer(_AGAIN_S, self._dial, self._retry)
        return self._failures < _TRIES

    def _connected(self, stream: Stream) -> None:
        self._give_up = lambda: None
        self._link = AgentLink(self._loop, stream, heard=self._hear, lost=self._lost)
        self._burst()

    def _burst(self) -> None:
        if self._link is not None:
            self._bursts, self._sent_at = self._bursts + 1, time.monotonic()
            for _ in range(self._sizes[0] // len(_PIECE)):
                self._link.send({"type": "burst", "data": _PIECE})
            self._link.send({"type": "burst_end"})

    def _hear(self, message: Message) -> None:
        if message["type"] == "burst_heard":
            if self._next():
                self._burst()
                return
            if self._link is not None:
                self._link.send(self._closing)
            if self._closing["back"] is None:
                self._end(Way(rate=self._rate), None)
        elif message["type"] == "back":
            self._end(Way(rate=self._rate), Way(rate=message["rate"], why=message["why"]))

    def _next(self) -> bool:
        """Notes the speed of a burst, and returns whether to send another one: a larger one, or the same again if the agents were busy."""
        took = max(1e-6, time.monotonic() - self._sent_at)
        self._rate = max(self._rate or 0.0, self._sizes[0] / took)
        if len(self._sizes) > 1 and self._sizes[1] / self._rate <= _BURST_S:
            self._sizes.pop(0)
            return True
        return took < _BURST_S and len(self._sizes) > 1 and self._bursts < _MOST_BURSTS

    def _lost(self, why: str) -> None:
        if not self._again():
            self._fail(why)

    def _fail(self, why: str) -> None:
        self._end(*((Way(why=why), None) if self._rate is None else (Way(rate=self._rate), Way(why=why))))

    def _late(self) -> None:
        connected = "no connection" if self._link is None else "a connection, but nothing gets through it,"
        self._fail(f"{connected} for {_LIMIT_S:g} s")

    def _end(self, there: Way, back: Way | None) -> None:
        if not self._over:
            self.close()
            self._ended(there, back)
