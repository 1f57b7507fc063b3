"""Classifies an error of etcd: an outage, which may pass; no space; a login that ran out; or a refusal, which a retry cannot change."""

from __future__ import annotations

import grpc

from elastic.errors import EtcdFull, EtcdRefused, EtcdUnavailable
from elastic.membership.endpoint import EtcdEndpoint

_LOGIN_RAN_OUT = ("invalid auth token", "auth token is not provided", "revision of auth store is old", "revision in header is old")
_WRONG_LOGIN = ("authentication failed", "user name is empty", "authentication is not enabled", "user name not found")
_TOO_LARGE = ("request is too large", "larger than max", "too many operations")
_REFUSING = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.ALREADY_EXISTS,
)


def login_ran_out(error: Exception) -> bool:
    """Whether another login may help: the token is too old, etcd was restarted, or its users have changed."""
    return any(text in _text(error) for text in _LOGIN_RAN_OUT)


def meaning(endpoint: EtcdEndpoint, error: Exception) -> EtcdUnavailable:
    """Returns the error to raise for an error of gRPC, or for a ValueError with etcd's reason for ending a watch."""
    code = error.code() if isinstance(error, grpc.Call) else None
    text = _text(error)
    if "database space exceeded" in text:
        advice = "compact and defragment it, or raise its quota, and then disarm its alarm (etcdctl alarm disarm)"
        return EtcdFull(f"{endpoint.title} has no space left ({text})" + ("" if endpoint.private else f": {advice}"))
    if any(known in text for known in _TOO_LARGE):
        return EtcdRefused(f"{endpoint.title} refused a request as too large ({text}): raise its --max-request-bytes and --max-txn-ops")
    if code is grpc.StatusCode.PERMISSION_DENIED or "permission denied" in text:
        return EtcdRefused(f"{endpoint.title} refused ({text}): its user needs the right to read and write under /elastic/")
    if code is grpc.StatusCode.UNAUTHENTICATED or any(known in text for known in _WRONG_LOGIN):
        return EtcdRefused(f"{endpoint.title} refused ({text}): check user and password in etcd='user:password@host:port'")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return EtcdRefused(f"{endpoint.title} does not answer as etcd version 3 does ({text}): check that this is its client port")
    if code in _REFUSING:
        return EtcdRefused(f"{endpoint.title} refused ({text})")
    if code is grpc.StatusCode.NOT_FOUND:
        return EtcdUnavailable(f"{endpoint.title} no longer has this agent's lease ({text})")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        text = "no answer in time"
    advice = "" if endpoint.private else ": check that it runs, and that this is its client port"
    return EtcdUnavailable(f"{endpoint.title} cannot be reached ({text}){advice}")


def _text(error: Exception) -> str:
    return str(error.details()) if isinstance(error, grpc.Call) else str(error)
