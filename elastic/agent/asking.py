"""Asks the agent that coordinates a job: a process of its own, since the etcd client needs an environment of its own.

stdin    {etcd, files, job, secret, credentials, request}
stdout   {answer} | {error}
"""

from __future__ import annotations

import json
import sys
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
    """Reads the question, and prints the answer."""
    question = json.loads(sys.stdin.read())
    try:
        print(json.dumps({"answer": ask(**question)}))
    except ElasticError as error:
        print(json.dumps({"error": str(error)}))


def ask(
    etcd: str, files: dict[str, str], job: str, secret: str, credentials: dict[str, str] | None, request: dict[str, Any]
) -> dict[str, Any]:
    """Returns the coordinator's answer. `credentials` are needed if the job's certificates are not made from its secret.

    Raises SettingsError if there is no such job or the secret is another, JobFailed without an answer, and EtcdUnavailable.
    """
    # Imported here: it takes long.
    from elastic.comm.job_certificate import job_credentials
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
    loop, found = Loop(), list[Any]()

    def connected(sock: Any) -> None:
        link = AgentLink(loop, sock, heard=found.append, lost=lambda why: found.append(LinkError(why)))
        link.send({"type": "ask", **request})

    key, address = bytes.fromhex(secret), (leader.address[0], leader.address[1])
    # A coordinator that is impersonated can choose no link in the clear: its proof would not be accepted.
    tls = Tls(job_credentials(key) if credentials is None else Credentials(**credentials))
    dial(loop, secret_of(key, leader.agent), address, connected, found.append, tls=tls, either=True)
    loop.set_timer(_ANSWER_S, lambda: found.append(LinkError(f"no answer for {_ANSWER_S:g} s")), "answer")
    while not found:
        loop.turn()
    answer = found[0]
    if isinstance(answer, WrongSecret):
        raise SettingsError(f"the job {job!r} has another secret")
    if isinstance(answer, TlsRefused):
        advice = "give the job's --tls-cert, --tls-key and --tls-ca"
        raise SettingsError(f"agent {leader.agent}, the coordinator, cannot be asked: {answer}; {advice}")
    if isinstance(answer, LinkError):
        raise JobFailed(f"agent {leader.agent}, the coordinator, does not answer: {answer}; it may have heard the request")
    if "refused" in answer:
        raise SettingsError(answer["refused"])
    return answer["told"]
