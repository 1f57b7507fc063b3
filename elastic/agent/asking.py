"""Asks the agent that coordinates a job: a process of its own, since the etcd client needs an environment of its own.

stdin    {etcd, files, job, secret, credentials, request}, and then any number of further requests, a line each
stdout   {answer} | {error}, a line for each request; an error is the last line
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
        try:
            while True:
                print(json.dumps({"answer": conversation.ask(request)}), flush=True)
                line = lines.wait(conversation.loop)
                if not line:
                    return
                request = json.loads(line)
        finally:
            conversation.close()
    except ElasticError as error:
        print(json.dumps({"error": str(error)}), flush=True)


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
        self._found, self._links = list[Any](), list[AgentLink]()
        key = bytes.fromhex(secret)
        # A coordinator that is impersonated can choose no link in the clear: its proof would not be accepted.
        tls = Tls(_own_credentials(key) if credentials is None else Credentials(**credentials))
        dial(self.loop, secret_of(key, self._leader), address, self._connected, self._found.append, tls=tls, either=True)
        self._wait(lambda: bool(self._links))

    def _connected(self, sock: Any) -> None:
        lost = lambda why: self._found.append(LinkError(why))  # noqa: E731
        self._links.append(AgentLink(self.loop, sock, heard=self._found.append, lost=lost))

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Returns the answer to a request."""
        self._links[0].send({"type": "ask", **request})
        answer = self._wait(lambda: False)
        if "refused" in answer:
            raise SettingsError(answer["refused"])
        return answer["told"]

    def _wait(self, done: Callable[[], bool]) -> Any:
        self.loop.set_timer(_ANSWER_S, lambda: self._found.append(LinkError(f"no answer for {_ANSWER_S:g} s")), "answer")
        while not self._found and not done():
            self.loop.turn()
        self.loop.clear_timer("answer")
        answer = self._found.pop(0) if self._found else None
        if isinstance(answer, WrongSecret):
            raise SettingsError(f"the job {self._job!r} has another secret")
        if isinstance(answer, TlsRefused):
            advice = "give the job's --tls-cert, --tls-key and --tls-ca"
            raise SettingsError(f"agent {self._leader}, the coordinator, cannot be asked: {answer}; {advice}")
        if isinstance(answer, LinkError):
            raise JobFailed(f"agent {self._leader}, the coordinator, does not answer: {answer}; it may have heard the request")
        return answer

    def close(self) -> None:
        """Ends the connection."""
        for link in self._links:
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
