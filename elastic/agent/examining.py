"""Examines etcd, a job, and the links to its agents: a process of its own, since the etcd client needs an environment of its own.

stdin    {etcd, files, job, secret, credentials, interface, workers}; job, secret and credentials may be None
stdout   {findings, links, demand, threads, isa, agents}; the last five only if the job's coordinator answers
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from elastic.agent.agent_link import AgentListener, secret_of
from elastic.agent.asking import ask
from elastic.agent.fitness import broken_link, speed
from elastic.agent.link_probes import LinkProbes, LinkReport
from elastic.agent.loop import Loop
from elastic.comm.tls import Credentials, Tls
from elastic.errors import ElasticError
from elastic.membership import versions
from elastic.membership.endpoint import EtcdEndpoint

Found = dict[str, str]


def main() -> None:
    """Reads the question, and prints what was found."""
    question = json.loads(sys.stdin.read())
    findings: list[Found] = []
    more = examined(findings, **question)
    print(json.dumps({"findings": findings, **more}))


def examined(
    findings: list[Found],
    *,
    etcd: str,
    files: dict[str, str],
    job: str | None,
    secret: str | None,
    credentials: dict[str, str] | None,
    interface: str,
    workers: int,
) -> dict[str, Any]:
    """Adds to `findings`; returns what a comparison with the job needs, nothing without one."""
    try:
        findings += _etcd(EtcdEndpoint.parse(etcd, files))
    except ElasticError as error:
        found, _, advice = str(error).rpartition(": ")
        findings.append(_finding("etcd", "error", found or advice, advice if found else "correct --etcd and its files"))
        return {}
    if job is None or secret is None:
        return {}
    try:
        told = ask(etcd, files, job, secret, credentials, {"what": "check", "workers": workers})
    except ElasticError as error:
        free = "no job of several hosts" in str(error)
        advice = "nothing, if the job has not begun" if free else "give the job's secret file, and let its hosts reach each other"
        findings.append(_finding("job", "ok" if free else "error", str(error), advice))
        return {}
    findings.append(_finding("job", "ok", f"{job} has {len(told['agents'])} host{'s' * (len(told['agents']) != 1)}, and the same secret"))
    tls = _tls(secret, credentials) if told.pop("tls") else None
    links = _links(bytes.fromhex(secret), interface, told["agents"], tls)
    findings += [_link(name, link) for name, link in sorted(links.items())]
    return {**told, "links": {name: asdict(link) for name, link in links.items()}}


def _etcd(endpoint: EtcdEndpoint) -> Iterator[Found]:
    from elastic.membership.etcd import EtcdClient  # takes long

    client = EtcdClient(endpoint)
    try:
        began = time.perf_counter()
        version = client.version
        took = (time.perf_counter() - began) * 1e3
        yield _finding("etcd", "ok", f"{endpoint.title} has version {version or '(not told)'} and answers in {took:.1f} ms")
        old = versions.warning(endpoint, version)
        if old is not None:
            text, _, advice = old.removeprefix("warning: ").partition(": upgrade")
            yield _finding("etcd version", "warning", text, f"upgrade{advice}")
        if (anybody := versions.unprotected(endpoint)) is not None:
            text, _, advice = anybody.removeprefix("warning: ").partition(". ")
            yield _finding("etcd login", "warning", text, advice)
    finally:
        client.close()


def _tls(secret: str, credentials: dict[str, str] | None) -> Tls:
    from elastic.comm.job_certificate import job_credentials  # takes long

    return Tls(job_credentials(bytes.fromhex(secret)) if credentials is None else Credentials(**credentials))


def _links(key: bytes, interface: str, agents: dict[str, list[Any]], tls: Tls | None) -> dict[str, LinkReport]:
    loop, found = Loop(), list[dict[str, LinkReport]]()
    name = f"doctor:{secrets.token_hex(8)}"  # no agent has it, and no other doctor, to which connections could be led
    listener = AgentListener(loop, secret_of(key, name), interface, tls)
    probes = LinkProbes(loop, key, name, listener.address, tls)
    listener.connected = probes.accept
    probes.check({name: (ip, port) for name, (ip, port) in agents.items()}, found.append)
    while not found:
        loop.turn()
    probes.close()
    listener.close()
    return found[0]


def _link(name: str, link: LinkReport) -> Found:
    broken = broken_link("here", name, link)
    if broken:
        return _finding(f"link {name}", "error", broken, "let every host reach every port of the others, or choose another --interface")
    return _finding(f"link {name}", "ok", f"{speed(link.there)} there, {speed(link.back)} back")


def _finding(what: str, level: str, found: str, advice: str = "") -> Found:
    return {"what": what, "level": level, "found": found, "advice": advice}


if __name__ == "__main__":
    main()
