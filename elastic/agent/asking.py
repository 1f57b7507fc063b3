"""Asks the agent that coordinates a job: a process of its own, since the etcd client needs an environment of its own.

stdin    {etcd, files, job, secret, credentials, request}, and then any number of further requests, a line each
stdout   {answer} | {error}, a line for each request
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from elastic.agent.agent_link import AgentLink, dial, secret_of
from elastic.agent.loop import Loop
from elastic.comm.handshake import WrongSecret
from elastic.comm.streams import TlsRefused
from elastic.comm.tls import Credentials, Tls
from elastic.errors import ElasticError, JobFailed, LinkError, SettingsError
from elastic.membership.endpoint import EtcdEndpoint

_ANSWER_S = 10.0


def main() -> None:
    """Answers the first question, and requests that follow it, a line each, over the same connection until stdin ends."""
    lines = _Lines()
    question = json.loads(lines.wait(Loop()))
    request = question.pop("request")
    try:
        conversation = Conversation(**question)
    except ElasticError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return
    line = json.dumps(request)
    while line:
        try:
            answer = {"answer": conversation.ask(json.loads(line))}
        except ElasticError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)
        line = lines.wait(conversation.loop)
    conversation.close()


class _Lines:
    """The lines of stdin. `wait` returns the next one, empty at the end; meanwhile a loop turns."""

    def __init__(self) -> None:
        self._data, self._over = b"", False

    def wait(self, loop: Loop) -> str:
        loop.watch(0, self._read)
        while b"\n" not in self._data and not self._over:
            loop.turn()
        loop.forget(0)
        line, _, self._data = self._data.partition(b"\n")
        return line.decode()

    def _read(self) -> None:
        data = os.read(0, 1 << 16)
        self._data, self._over = self._data + data, not data


class Conversation:
    """A connection to the agent that coordinates a job. `credentials` are needed if the job's
    certificates are not made from its secret.

    Raises SettingsError if there is no such job or the secret is another, JobFailed without an answer, and EtcdUnavailable.
    """

    def __init__(self, etcd: str, files: dict[str, str], job: str, secret: str, credentials: dict[str, str] | None) -> None:
        self.loop, self._job = Loop(), job
        self._leader, address = coordinator_of(etcd, files, job)
        self._found, self._links = list[Any](), dict[str, AgentLink]()
        self._key = bytes.fromhex(secret)
        # A coordinator that is impersonated can choose no link in the clear: its proof would not be accepted.
        self._tls = Tls(_own_credentials(self._key) if credentials is None else Credentials(**credentials))
        self._dial(self._leader, address)

    def _dial(self, agent: str, address: tuple[str, int]) -> None:
        lost = lambda why: self._found.append(LinkError(why)) if agent in self._links else None  # noqa: E731

        def connected(sock: Any) -> None:
            self._links[agent] = AgentLink(self.loop, sock, heard=self._found.append, lost=lost)

        dial(self.loop, secret_of(self._key, agent), address, connected, self._found.append, tls=self._tls, either=True)
        self._wait(agent, lambda: agent in self._links)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Returns the answer to a request. With `of`, an agent and its address, that one is asked."""
        agent, address = request.pop("of", (self._leader, None))
        if agent not in self._links and address is not None:
            self._dial(agent, (address[0], address[1]))
        self._links[agent].send({"type": "ask", **request})
        answer = self._wait(agent, lambda: False)
        if "refused" in answer:
            raise SettingsError(answer["refused"])
        return answer["told"]

    def _wait(self, agent: str, done: Callable[[], bool]) -> Any:
        self.loop.set_timer(_ANSWER_S, lambda: self._found.append(LinkError(f"no answer for {_ANSWER_S:g} s")), "answer")
        while not self._found and not done():
            self.loop.turn()
        self.loop.clear_timer("answer")
        answer = self._found.pop(0) if self._found else None
        whom = f"{agent}, the coordinator," if agent == self._leader else agent
        if isinstance(answer, WrongSecret):
            raise SettingsError(f"the job {self._job!r} has another secret")
        if isinstance(answer, TlsRefused):
            advice = "give the job's --tls-cert, --tls-key and --tls-ca"
            raise SettingsError(f"agent {whom} cannot be asked: {answer}; {advice}")
        if isinstance(answer, LinkError):
            if (link := self._links.pop(agent, None)) is not None:
                link.close()
            raise JobFailed(f"agent {whom} does not answer: {answer}; it may have heard the request")
        return answer

    def close(self) -> None:
        """Ends the connection."""
        for link in self._links.values():
            link.close()


def _own_credentials(key: bytes) -> Credentials:
    from elastic.comm.job_certificate import job_credentials  # takes long

    return job_credentials(key)


def coordinator_of(etcd: str, files: dict[str, str], job: str) -> tuple[str, tuple[str, int]]:
    """Returns the agent that coordinates a job, and its address. Raises SettingsError if there is none."""
    # Imported here: it takes long.
    from elastic.membership.claim import incarnation_of
    from elastic.membership.election import Election
    from elastic.membership.etcd import EtcdClient

    client = EtcdClient(EtcdEndpoint.parse(etcd, files))
    try:
        prefix = incarnation_of(client, job)
        leader = None if prefix is None else Election(client, f"{prefix}coordinator", "", lambda: 0).leader()
    finally:
        client.close()
    if leader is None or leader.address is None:
        raise SettingsError(f"no job of several hosts with the name {job!r} runs at this etcd")
    return leader.agent, (leader.address[0], leader.address[1])


def ask(
    etcd: str, files: dict[str, str], job: str, secret: str, credentials: dict[str, str] | None, request: dict[str, Any]
) -> dict[str, Any]:
    """Returns the coordinator's answer to one request. Raises what `Conversation` raises."""
    conversation = Conversation(etcd, files, job, secret, credentials)
    try:
        return conversation.ask(request)
    finally:
        conversation.close()
